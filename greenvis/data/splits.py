"""What a data set holds once it is read: images, labels and their digest, in splits that share no
image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Lazy:
    """Images read one at a time: `read(row)` gives uint8 (C, H, W), of any size."""

    read: Callable[[int], Tensor]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(self.rows[index])

    def take(self, indices: Iterable[int]) -> Lazy:
        """Return the images at `indices`, still unread."""
        return Lazy(self.read, [self.rows[i] for i in indices])


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W), or Lazy. labels: int64 (N,)."""

    images: Tensor | Lazy
    labels: Tensor

    def take(self, rows: Tensor) -> Split:
        """Return the images and labels at `rows`."""
        images = (
            self.images[rows]
            if isinstance(self.images, Tensor)
            else self.images.take(rows.tolist())
        )
        return Split(images, self.labels[rows])


@dataclass(frozen=True)
class Stored:
    """A data set as it is stored.

    Args:
        train: Images to train on; labels of -1 are not known.
        test: Images that no training may see, all of them labelled.
        classes: Names, by label.
        checksum: Hex sha256 over what was read.
        img_size: Side in pixels that it has, or is best brought to.
        in_chans: Channels, likewise: 1 or 3.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    checksum: str
    img_size: int
    in_chans: int


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
    """Divide one split into train and test by class. Always with seed 0, so that every run has the
    same test images."""
    order = stratified(split.labels, seed=0)
    return split.take(order[test:].sort().values), split.take(order[:test].sort().values)


def divide_by_share(split: Split) -> tuple[Split, Split]:
    """Divide one split that has no test beside it: a fifth of each class is the test."""
    return divide(split, test=max(1, round(TEST_SHARE * len(split.labels))))


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
