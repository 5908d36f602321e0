"""Emoji: the same concepts drawn by several artists, from npm packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.data.sets._emoji import CACHE, PNG_STYLES, STYLES, Drawing, Library, install
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.collages import Items
    from greenvis.data.splits import Stored

SIDE = 64
LEAST_IMAGES = 5  # of a subgroup that is a class
LEFT_OUT = "Component"  # a group of parts that are no pictures: skin tones, hair


class Emoji(DataSet):
    """Emoji in colour, on white, each with its name, in one of nine styles.

    Those of google and twitter are 64x64; emojione, fluent-emoji-flat, fxemoji, noto, noto-v1,
    openmoji and twemoji are drawn at `img_size`, else 64. Classes are Unicode's subgroups
    ("food-fruit") of five images or more, a fifth of each as the test; each image has its own name
    ("red apple"). Those drawn alike are one image. Styles are domains: `domains: {train: [google],
    test: [google, twitter]}`.
    """

    name = "emoji"
    argument = "STYLE"
    values = tuple(STYLES)
    source = "https://www.npmjs.com/package/emoji-datasource, https://icon-sets.iconify.design"
    licence = "; ".join(f"{licence} ({style})" for style, licence in STYLES.items())
    size = {"train": 1_600, "test": 400}
    options = frozenset({"root"})

    @classmethod
    def licences(cls) -> Mapping[str, str]:
        """Return the licence of each style."""
        return STYLES

    def fetch(self) -> Path:
        """Fetch the style's packages by npm."""
        folder = self.root or CACHE
        install(self.value, folder)
        self._library()
        return folder

    def domain(self, name: str) -> DataSet | None:
        """Return the emoji in another style."""
        if name not in STYLES:
            return None
        spec = self.spec.model_copy(update={"name": f"emoji:{name}"})
        return Emoji(spec, self.folder)

    def check(self) -> None:
        """Raise BadInput for an unknown style, and where its packages are not here."""
        self._library()

    def read(self) -> Stored:
        """Return all emoji of the style."""
        import torch

        from greenvis.data.splits import Split, Stored, divide_by_share, sha256

        library, side = self._library(), self._side()
        drawn: dict[bytes, tuple[Tensor, Drawing]] = {}
        for drawing in library.drawings():
            image = _decode(drawing, side, "white")
            drawn.setdefault(image.numpy().tobytes(), (image, drawing))
        counts = Counter(drawing.concept.subgroup for _, drawing in drawn.values())
        classes = tuple(sorted(group for group, n in counts.items() if n >= LEAST_IMAGES))
        if len(classes) < 2:
            raise BadInput(
                f"{library.package} has fewer than two subgroups of {LEAST_IMAGES} emoji"
            )
        chosen = [pair for pair in drawn.values() if pair[1].concept.subgroup in classes]
        pixels = torch.stack([image for image, _ in chosen])
        labels = torch.tensor([classes.index(drawing.concept.subgroup) for _, drawing in chosen])
        names = tuple(drawing.concept.name for _, drawing in chosen)
        train, test = divide_by_share(Split(pixels, labels, names))
        digest = sha256([pixels.numpy().tobytes(), labels.numpy().tobytes()])
        return Stored(train, test, classes, digest, side, 3)

    def groups(self) -> tuple[tuple[Items, Items], tuple[str, ...]]:
        """Return the emoji as items of collages, for training and for the test (a fifth of each
        group), and the names of their groups."""
        import torch

        from greenvis.data.collages import Items
        from greenvis.data.splits import Split, divide_by_share

        drawings = [d for d in self._library().drawings() if d.concept.group != LEFT_OUT]
        classes = tuple(sorted({d.concept.group for d in drawings}))
        # what differs before black and before white is what shows the background
        black, white = (
            torch.stack([_decode(d, SIDE, colour) for d in drawings])
            for colour in ("black", "white")
        )
        labels = torch.tensor([classes.index(d.concept.group) for d in drawings])
        items = []
        for part in divide_by_share(Split(torch.cat([black, white], 1), labels)):
            pixels = torch.as_tensor(part.images).float() / 255
            alpha = 1 - (pixels[:, 3:] - pixels[:, :3]).mean(1, keepdim=True)
            items.append(Items(pixels[:, :3], alpha, part.labels + 1))
        return (items[0], items[1]), classes

    def _library(self) -> Library:
        roots = [self.root] if self.root else [self.folder.resolve(), CACHE]
        return Library(self.value, roots)

    def _side(self) -> int:
        return SIDE if self.value in PNG_STYLES else self.spec.img_size or SIDE


def _decode(drawing: Drawing, side: int, background: str) -> Tensor:
    """Return a picture, uint8 (3, side, side)."""
    from greenvis.data import images

    named = f"image {drawing.source}" if isinstance(drawing.source, Path) else "drawing"
    what = f"{named} of the emoji {drawing.concept.code}"
    image = images.decode(drawing.png(side), what, background)
    if image.shape != (3, side, side):
        raise BadInput(f"the {what} is not {side}x{side}; get the package anew")
    return image
