"""Shapes or emoji on textures, with masks, boxes, labels or counts: segmentation, detection,
multi-label classification and regression of one kind of image."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.data.sets.emoji import Emoji
from greenvis.data.spec import DataSpec
from greenvis.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.collages import Collages, Items
    from greenvis.data.splits import Split, Stored

SIDE = 96
MOST_ITEMS = 4
SIZES = (0.25, 0.5)  # of an item, as shares of an image's side
KINDS = ("masks", "boxes", "labels", "counts")
DRAWN = ("circle", "square", "triangle", "star", "cross", "ring")
OUTLINE_SIDE = 64  # pixels a shape is drawn in
THIRDS = (math.pi, math.pi / 3, -math.pi / 3)  # where the sides of a triangle look to
STYLE = "google"


class Shapes(DataSet):
    """One to four coloured shapes, or emoji, on synthetic texture, with masks, boxes, labels or
    counts.

    `shapes:masks` labels each pixel, `shapes:boxes` has the boxes of what can be seen,
    `shapes:labels` says which classes an image shows, `shapes:counts` how many there are of each.
    `shapes:emoji-masks` and so on show emoji instead (those of `emoji:google`), classes are their
    groups, and those of the test are other emoji. 2,000 images to train and 500 to test, 96 pixels,
    unless asked for others; the first images of a seed are the same, however many are drawn.
    """

    name = "shapes"
    argument = "LABELS"
    values = (*KINDS, *(f"emoji-{kind}" for kind in ("masks", "boxes", "labels", "counts")))
    source = "drawn by greenvis (emoji: https://www.npmjs.com/package/emoji-datasource)"
    licence = "CC0-1.0; Apache-2.0 (emoji)"
    size = {"train": 20_000, "test": 10_000}
    options = frozenset({"root"})

    def check(self) -> None:
        """Raise BadInput for an unknown kind of labels, and where emoji are not here."""
        if self.value not in self.values:
            near = nearest(self.value, self.values)
            raise BadInput(f"unknown data set 'shapes:{self.value}'{near}")
        if (emoji := self._emoji()) is not None:
            emoji.check()
        elif self.root:
            raise BadInput(
                f"data: 'shapes:{self.value}' is drawn, so root would change nothing; leave it out"
            )

    def fetch(self) -> Path:
        """Fetch the emoji."""
        emoji = self._emoji()
        return super().fetch() if emoji is None else emoji.fetch()

    def read(self) -> Stored:
        """Draw as many as asked for."""
        from greenvis.data import collages
        from greenvis.data.splits import Stored, sha256

        self.check()
        spec, side, emoji = self.spec, self.spec.img_size or SIDE, self._emoji()
        sources, classes = _shapes() if emoji is None else emoji.groups()
        counts = ((spec.train or 2000) + (spec.held_out or 0), spec.test or 500)
        splits, chunks = [], []
        for number, (items, count) in enumerate(zip(sources, counts, strict=True)):
            drawn = collages.draw(
                items, count, side, seed=2 * spec.seed + number, most=MOST_ITEMS, sizes=SIZES
            )
            splits.append(self._labelled(drawn, len(classes), side))
            chunks += [drawn.images.numpy().tobytes(), drawn.masks.numpy().tobytes()]
        names = classes if self._kind in ("labels", "counts") else ("background", *classes)
        digest = sha256([self.value.encode(), *chunks])
        return Stored(splits[0], splits[1], names, digest, side, 3)

    @property
    def _kind(self) -> str:
        return self.value.removeprefix("emoji-")

    def _emoji(self) -> Emoji | None:
        """Return the emoji to show; None where shapes are."""
        if not self.value.startswith("emoji-"):
            return None
        return Emoji(DataSpec(name=f"emoji:{STYLE}", root=self.spec.root), self.folder)

    def _labelled(self, drawn: Collages, classes: int, side: int) -> Split:
        import torch

        from greenvis.data.splits import Boxes, Split

        if self._kind == "masks":
            return Split(drawn.images, drawn.masks.char())
        if self._kind == "boxes":
            return Split(drawn.images, Boxes(drawn.boxes.__getitem__, range(len(drawn.boxes))))
        shown = torch.stack([t["labels"].bincount(minlength=classes + 1) for t in drawn.boxes])
        counts = shown[:, 1:]
        labels = counts.float() if self._kind == "counts" else counts.clamp(max=1).byte()
        return Split(drawn.images, labels)


def _shapes() -> tuple[tuple[Items, Items], tuple[str, ...]]:
    """Return the shapes, for training and for the test, and their names."""
    import torch

    from greenvis.data.collages import Items

    axis = (2 * torch.arange(OUTLINE_SIDE) + 1) / OUTLINE_SIDE - 1
    alpha = (_outlines(axis.view(1, -1), axis.view(-1, 1)) * OUTLINE_SIDE / 2 + 0.5).clamp(0, 1)
    items = Items(alpha.unsqueeze(1).expand(-1, 3, -1, -1), alpha.unsqueeze(1), 1 + torch.arange(6))
    items = replace(items, tinted=True)
    return (items, items), DRAWN


def _outlines(x: Tensor, y: Tensor) -> Tensor:
    """Return how deep each point lies inside each shape of `DRAWN`, below 0 outside, (6, height,
    width); x and y run from -1 to 1."""
    import torch

    radius, angle = torch.hypot(x, y), torch.atan2(x, -y)
    corners = [torch.sin(torch.tensor(a)) * x - torch.cos(torch.tensor(a)) * y for a in THIRDS]
    tip, dent, wedge = 0.95, 0.4, math.pi / 5  # of a star: radii, and the angle between them
    turn = (angle % (2 * wedge) - wedge).abs()
    edge = tip * dent * math.sin(wedge)
    star = edge / (tip * (wedge - turn).sin() + dent * turn.sin()) - radius
    across, down = x.abs().expand_as(radius), y.abs().expand_as(radius)
    bar = torch.minimum(0.28 - across, 0.85 - down)
    return torch.stack(
        [
            0.85 - radius,
            0.75 - torch.maximum(across, down),
            0.45 - torch.stack(corners).amax(0),
            star,
            torch.maximum(bar, bar.T),
            0.2 - (radius - 0.65).abs(),
        ]
    )
