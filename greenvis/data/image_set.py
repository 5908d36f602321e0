"""Images and labels that any run can show again: what is seen depends on seed, epoch and index
only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from greenvis.data.splits import Split, sha256
from greenvis.data.transforms import Transform


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images and labels, brought to size. An index is a position, or (epoch, position) where
    augmentation is wanted.

    targets: int64 (N,). ids: each image's row in its source, which its augmentation follows
    whatever the subset.
    """

    def __init__(self, split: Split, ids: Tensor, transform: Transform) -> None:
        self.split, self.ids, self.transform = split, ids, transform

    @property
    def targets(self) -> Tensor:
        """The labels, int64 (N,)."""
        return self.split.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = index if isinstance(index, tuple) else (0, index)
        x, y = self.batch([range(len(self))[position]], epoch)
        return x[0], int(y[0])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """Return many at once: what a plain DataLoader calls."""
        pairs = [i if isinstance(i, tuple) else (0, i) for i in indices]
        if len({epoch for epoch, _ in pairs}) != 1:
            return [self[p] for p in pairs]
        x, y = self.batch([position for _, position in pairs], pairs[0][0])
        return list(zip(x.unbind(), y.tolist(), strict=True))

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return images and labels at some positions.

        Args:
            positions: int64 (B,).
            epoch: Which augmentation, from 0.

        Returns:
            x float32 (B, C, H, W), normalised, and y int64 (B,).
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        images = self.split.images
        if isinstance(images, Tensor):
            x = self.transform.fit(images.index_select(0, rows))
        else:
            x = torch.stack([self.transform.fit(images[i]) for i in rows.tolist()])
        x = self.transform.change(x, self.ids[rows].numpy(), epoch)
        return self.transform.normalise(x), self.split.labels[rows]

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset; its images keep their ids, and so their augmentation.

        Args:
            positions: int64 (n,).

        Returns:
            The subset, in this order.
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return ImageSet(self.split.take(rows), self.ids[rows], self.transform)

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on: which images, and what is done
        to them."""
        return {
            "images": sha256([self.ids.numpy().tobytes(), self.split.labels.numpy().tobytes()]),
            "transform": str(self.transform),
        }
