"""Emoji: the same concepts drawn by several artists, from npm packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.data.sets._emoji import CACHE, PNG_STYLES, STYLES, Drawing, Library, install
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.collages import Items
    from greenvis.data.splits import Split, Stored

SIDE = 64
LEAST_IMAGES = 5  # of a subgroup that is a class
LEFT_OUT = "Component"  # a group of parts that are no pictures: skin tones, hair


class Emoji(DataSet):
    """Emoji in colour, on white, each with its name, in one of nine styles.

    Those of google and twitter are 64x64; emojione, fluent-emoji-flat, fxemoji, noto, noto-v1,
    openmoji and twemoji are drawn at `img_size`, else 64. Classes are Unicode's subgroups
    ("food-fruit") of five images or more, a fifth of each as the test; each image has its own name
    ("red apple"). Those drawn alike are one image. Styles are domains: `domains: {train: [google],
    test: [google, twitter]}`. Several styles are one data set, "google+twitter", whose test is a
    fifth of the concepts of each subgroup, which no image of the training shows in any style.
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
        for style in self.styles:
            install(style, folder)
        self._libraries()
        return folder

    def domain(self, name: str) -> DataSet | None:
        """Return the emoji in another style."""
        if name not in STYLES:
            return None
        spec = self.spec.model_copy(update={"name": f"emoji:{name}"})
        return Emoji(spec, self.folder)

    def check(self) -> None:
        """Raise BadInput for an unknown style, and where its packages are not here."""
        self._libraries()

    def read(self) -> Stored:
        """Return all emoji of the style."""
        import torch

        from greenvis.data.splits import Split, Stored, divide_by_share, sha256

        side = self._side()
        drawn: dict[bytes, tuple[Tensor, Drawing]] = {}
        for library in self._libraries():
            for drawing in library.drawings():
                image = _decode(drawing, side, "white")
                drawn.setdefault(image.numpy().tobytes(), (image, drawing))
        concepts = {d.concept.code: d.concept.subgroup for _, d in drawn.values()}
        counts = Counter(concepts.values())
        classes = tuple(sorted(group for group, n in counts.items() if n >= LEAST_IMAGES))
        if len(classes) < 2:
            raise BadInput(
                f"emoji:{self.value} has fewer than two subgroups of {LEAST_IMAGES} emoji"
            )
        chosen = [pair for pair in drawn.values() if pair[1].concept.subgroup in classes]
        pixels = torch.stack([image for image, _ in chosen])
        labels = torch.tensor([classes.index(drawing.concept.subgroup) for _, drawing in chosen])
        names = tuple(drawing.concept.name for _, drawing in chosen)
        codes = [drawing.concept.code for _, drawing in chosen]
        every = Split(pixels, labels, names)
        train, test = divide_by_share(every) if len(self.styles) == 1 else _by_concept(every, codes)
        digest = sha256([pixels.numpy().tobytes(), labels.numpy().tobytes()])
        return Stored(train, test, classes, digest, side, 3)

    def groups(self) -> tuple[tuple[Items, Items], tuple[str, ...]]:
        """Return the emoji as items of collages, for training and for the test (a fifth of each
        group), and the names of their groups."""
        import torch

        from greenvis.data.collages import Items
        from greenvis.data.splits import Split, divide_by_share

        library, *more = self._libraries()
        if more:
            raise BadInput(f"emoji of one style are items, not of several ({self.value})")
        drawings = [d for d in library.drawings() if d.concept.group != LEFT_OUT]
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

    @property
    def most(self) -> Mapping[str, int]:
        """Images by split of one style; {} for several."""
        return self.size if len(self.styles) == 1 else {}

    @property
    def styles(self) -> tuple[str, ...]:
        """Names of the styles that are read."""
        return tuple(dict.fromkeys(self.value.split("+")))

    def _libraries(self) -> list[Library]:
        roots = [self.root] if self.root else [self.folder.resolve(), CACHE]
        return [Library(style, roots) for style in self.styles]

    def _side(self) -> int:
        return SIDE if {*self.styles} & {*PNG_STYLES} else self.spec.img_size or SIDE


def _by_concept(split: Split, codes: Sequence[str]) -> tuple[Split, Split]:
    """Divide emoji in several styles, so that a concept is in one part in all of them.

    Args:
        split: N images with their labels.
        codes: The concept of each.
    """
    import torch

    from greenvis.data.splits import divide_by_share

    first = {code: i for i, code in reversed([*enumerate(codes)])}
    names = tuple(sorted(first))
    concepts = replace(split.take(torch.tensor([first[code] for code in names])), names=names)
    unseen = {*divide_by_share(concepts)[1].names}
    test = torch.tensor([code in unseen for code in codes])
    return split.take((~test).nonzero().squeeze(1)), split.take(test.nonzero().squeeze(1))


def _decode(drawing: Drawing, side: int, background: str) -> Tensor:
    """Return a picture, uint8 (3, side, side)."""
    from greenvis.data import images

    named = f"image {drawing.source}" if isinstance(drawing.source, Path) else "drawing"
    what = f"{named} of the emoji {drawing.concept.code}"
    image = images.decode(drawing.png(side), what, background)
    if image.shape != (3, side, side):
        raise BadInput(f"the {what} is not {side}x{side}; get the package anew")
    return image
