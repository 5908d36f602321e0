"""What a data set holds once it is read: images, labels and their digest, in splits that share no
image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

TEST_SHARE = 0.2


Kind = Literal["class", "multilabel", "number", "mask", "box"]
UNKNOWN = -1  # a label that nobody has given; NaN in a number


@dataclass(frozen=True)
class Lazy:
    """Images or masks read one at a time: `read(row)` gives uint8 (C, H, W), or integers (H, W),
    of any size."""

    read: Callable[[Any], Any]
    rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.read(self.rows[index])

    def take(self, indices: Iterable[int]) -> Self:
        """Return those at `indices`, still unread."""
        return replace(self, rows=[self.rows[i] for i in indices])


class Boxes(Lazy):
    """Boxes read one image at a time: {"boxes": tv_tensors.BoundingBoxes (n, 4), "labels": int64
    (n,)}; the boxes' canvas is their image's size."""


@dataclass(frozen=True)
class Split:
    """Images and their labels, whose form says of which kind they are.

    Attributes:
        images: uint8 (N, C, H, W), or Lazy.
        labels: A class: int64 (N,). Several of L ("multilabel"): integers (N, L) of 0 and 1.
            Numbers: float32 (N, D). A mask: integers (N, H, W), or Lazy of (H, W), as large as the
            image. Boxes: `Boxes`. What nobody knows is -1 (a pixel too), NaN in a number.
        names: Each image's own, for captions; () where the data has none.
    """

    images: Tensor | Lazy
    labels: Any
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> Kind:
        """Of the labels."""
        if isinstance(self.labels, Lazy):
            return "box" if isinstance(self.labels, Boxes) else "mask"
        if self.labels.dim() == 2:
            return "number" if self.labels.is_floating_point() else "multilabel"
        return "mask" if self.labels.dim() == 3 else "class"

    @property
    def known(self) -> Tensor:
        """Whose label is known, in part at least: bool (N,). What is unread counts as known."""
        if isinstance(self.labels, Lazy):
            return torch.ones(len(self), dtype=torch.bool)
        entries = ~self.labels.isnan() if self.kind == "number" else self.labels >= 0
        return entries if entries.dim() == 1 else entries.flatten(1).any(1)

    @property
    def groups(self) -> Tensor:
        """What to draw evenly from: the class, the first of several, else the same for all; -1
        where nothing is known. int64 (N,)."""
        if self.kind == "class":
            return self.labels
        groups = torch.zeros(len(self), dtype=torch.int64)
        if self.kind == "multilabel":
            groups = (self.labels == 1).int().argmax(1)
        return groups.masked_fill(~self.known, UNKNOWN)

    def take(self, rows: Tensor) -> Split:
        """Return the images and labels at `rows`."""
        names = tuple(self.names[i] for i in rows.tolist()) if self.names else ()
        return Split(_take(self.images, rows), _take(self.labels, rows), names)

    def without_labels(self) -> Split:
        """Return the images, of which nothing is known: labels of -1, int64 (N,), and no names."""
        return Split(self.images, torch.full((len(self),), UNKNOWN))


def join(splits: Sequence[Split]) -> Split:
    """Return splits one behind another. Their images are read where they are: nothing is copied."""

    def joined(parts: Sequence[Any]) -> Any:
        if all(isinstance(part, Tensor) and part.dim() < 3 for part in parts):
            return torch.cat(list(parts))
        kind = Boxes if isinstance(parts[0], Boxes) else Lazy
        rows = [(i, row) for i, part in enumerate(parts) for row in range(len(part))]
        return kind(lambda at: parts[at[0]][at[1]], rows)

    names = tuple(name for split in splits for name in split.names)
    return Split(joined([s.images for s in splits]), joined([s.labels for s in splits]), names)


def _take(part: Tensor | Lazy, rows: Tensor) -> Any:
    return part[rows] if isinstance(part, Tensor) else part.take(rows.tolist())


@dataclass(frozen=True)
class Stored:
    """A data set as it is stored.

    Args:
        train: Images to train on; labels of -1 are not known (see `Split`).
        test: Images that no training may see, all of them labelled.
        classes: Names, by label.
        checksum: Hex sha256 over what was read.
        img_size: Side in pixels that it has, or is best brought to.
        in_chans: Channels, likewise: 1 or 3.
        skipped: What is broken and was left out, a line each.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    checksum: str
    img_size: int
    in_chans: int
    skipped: tuple[str, ...] = ()


def stratified(labels: Tensor, seed: int) -> Tensor:
    """Order all rows so that the first n hold each class in proportion (to within one image),
    whatever n.

    Subsets of one seed are therefore nested: the first 100 are among the first 200.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        of_class = shuffled[labels[shuffled] == label]
        rank[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    return shuffled[torch.argsort(rank[shuffled], stable=True)]


def divide(split: Split, test: int) -> tuple[Split, Split]:
    """Divide one split into train and test by class; what has no label stays in train. Always with
    seed 0, so that every run has the same test images."""
    groups = split.groups
    labelled = (groups >= 0).nonzero().squeeze(1)
    rows = labelled[stratified(groups[labelled], seed=0)[:test]].sort().values
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[rows] = False
    return split.take(rest.nonzero().squeeze(1)), split.take(rows)


def divide_by_share(split: Split) -> tuple[Split, Split]:
    """Divide one split that has no test beside it: a fifth of each class is the test."""
    return divide(split, test=max(1, round(TEST_SHARE * len(split))))


def sha256(chunks: Iterable[bytes | Path]) -> str:
    """Return the hex digest over all chunks, or files in pieces, with each one's length so that
    their borders count."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(
            (len(chunk) if isinstance(chunk, bytes) else chunk.stat().st_size).to_bytes(8, "little")
        )
        if isinstance(chunk, bytes):
            digest.update(chunk)
            continue
        with chunk.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
