"""One object an image, on noise, with a mask: what lies in front alone tells images apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenvis.data.sets.scenes import Scenes

if TYPE_CHECKING:
    from greenvis.data.collages import Ground


class Objects(Scenes):
    """One of the clothes of `scenes` per image, grey, on noise that is alike in all images, each
    pixel labelled.

    For methods that learn without labels to tell images apart: in `scenes` each image has a texture
    of its own, which does that better than what lies on it. 2,000 images to train and 500 to test,
    48 pixels, unless asked for others.
    """

    name = "objects"
    most_items = 1
    sizes = (0.5, 0.9)
    tinted = False

    def ground(self) -> Ground:
        """Return what draws the backgrounds."""
        from greenvis.data import collages

        return collages.noise
