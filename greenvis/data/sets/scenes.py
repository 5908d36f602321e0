"""Clothes on textures, with a mask: semantic segmentation without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from greenvis.data.dataset import DataSet
from greenvis.data.sets.digits import Digits
from greenvis.data.sets.fashion_mnist import FashionMnist
from greenvis.data.spec import DataSpec
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from greenvis.data.collages import Ground, Items
    from greenvis.data.splits import Split, Stored

SIDE = 48


class Scenes(DataSet):
    """One to three clothes on synthetic texture, each pixel labelled with its item's class.

    Items are of Fashion-MNIST; those of the test are of its own test. On a machine without
    Fashion-MNIST the items are the digits of scikit-learn, and the classes say so. 2,000 images to
    train and 500 to test, 48 pixels, unless asked for others; the first images of a seed are the
    same, however many are drawn.
    """

    name = "scenes"
    source = "drawn by greenvis of Fashion-MNIST (or of scikit-learn's digits)"
    licence = "MIT (Fashion-MNIST); CC-BY-4.0 (digits)"
    size = {"train": 20_000, "test": 10_000}
    most_items: ClassVar[int] = 3
    sizes: ClassVar[tuple[float, float]] = (0.35, 0.7)  # of an item, as shares of an image's side
    tinted: ClassVar[bool] = True  # whether each item gets a colour of its own

    def ground(self) -> Ground:
        """Return what draws the backgrounds."""
        from greenvis.data import collages

        return collages.textures

    def read(self) -> Stored:
        """Draw as many as asked for."""
        from greenvis.data import collages
        from greenvis.data.splits import Split, Stored, sha256

        spec, stored, side = self.spec, _source().read(), self.spec.img_size or SIDE
        counts = ((spec.train or 2000) + (spec.held_out or 0), spec.test or 500)
        splits = []
        for number, (count, split) in enumerate(
            zip(counts, (stored.train, stored.test), strict=True)
        ):
            drawn = collages.draw(
                _items(split, self.tinted),
                count,
                side,
                seed=2 * spec.seed + number,
                most=self.most_items,
                sizes=self.sizes,
                ground=self.ground(),
            )
            splits.append(Split(drawn.images, drawn.masks.char()))
        train, test = splits
        digest = sha256(
            part.numpy().tobytes() for s in (train, test) for part in (s.images, s.labels)
        )
        return Stored(train, test, ("background", *stored.classes), digest, side, 3)


def _source() -> DataSet:
    """Return the data set that items are taken from."""
    fashion = FashionMnist(DataSpec(name=FashionMnist.name))
    try:
        fashion.check()
    except BadInput:
        return Digits(DataSpec(name=Digits.name))
    return fashion


def _items(split: Split, tinted: bool) -> Items:
    """Return the images of a split as items: what is black is beside them."""
    import torch
    from torch.nn import functional as F

    from greenvis.data.collages import Items

    pixels = torch.as_tensor(split.images).float() / 255
    if pixels.shape[-1] < 28:  # digits of 8 pixels have no edges to follow
        pixels = F.interpolate(pixels, size=(28, 28), mode="bicubic").clamp(0, 1)
    alpha = (4 * pixels).clamp(0, 1)
    colour = (alpha * (0.25 + 0.75 * pixels)).expand(-1, 3, -1, -1)
    return Items(colour, alpha, split.labels + 1, tinted=tinted)
