"""Images and labels that any run can show again: what is seen depends on seed, epoch and index
only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from greenvis.data.splits import Split, join, sha256
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput


class ImageSet(Dataset[tuple[Tensor, Any]]):
    """Images and labels, brought to size. An index is a position, or (epoch, position) where
    augmentation is wanted.

    targets: the labels, of a kind that `Split` lists. ids: each image's row in its source, which
    its augmentation follows whatever the subset.
    """

    label_kind = ""  # what a label costs as, where that is not `Split.kind`

    def __init__(self, split: Split, ids: Tensor, transform: Transform) -> None:
        self.split, self.ids, self.transform = split, ids, transform

    @property
    def targets(self) -> Any:
        """The labels: int64 (N,) where they are classes, -1 where one is not known; else as `Split`
        says."""
        return self.split.labels

    @property
    def known(self) -> Tensor:
        """Whose label is known: bool (N,)."""
        return self.split.known

    @property
    def domains(self) -> Tensor:
        """Which domain each image is of, int64 (N,), from 0: all of one, unless it is of several
        sets."""
        return torch.zeros(len(self), dtype=torch.int64)

    def classes(self, who: str) -> Tensor:
        """Return the class of each image, int64 (N,).

        Args:
            who: What asks, for the message.

        Raises:
            BadInput: Where labels are of another kind, or one is not known.
        """
        if self.split.kind != "class":
            raise BadInput(f"{who} needs one class an image, not labels of kind {self.split.kind}")
        if unknown := int((~self.known).sum()):
            raise BadInput(
                f"{who} needs the class of every image, and that of {unknown} is not known"
            )
        return self.targets

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Any]:
        epoch, position = index if isinstance(index, tuple) else (0, index)
        x, y = self.batch([range(len(self))[position]], epoch)
        return x[0], _each(y)[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, Any]]:
        """Return many at once: what a plain DataLoader calls."""
        pairs = [i if isinstance(i, tuple) else (0, i) for i in indices]
        if len({epoch for epoch, _ in pairs}) != 1:
            return [self[p] for p in pairs]
        x, y = self.batch([position for _, position in pairs], pairs[0][0])
        return [(x[i], label) for i, label in enumerate(_each(y))]

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Tensor, Any]:
        """Return images and labels at some positions.

        Args:
            positions: int64 (B,).
            epoch: Which augmentation, from 0.

        Returns:
            x float32 (B, C, H, W), normalised, and y: classes int64 (B,), several or numbers
            float32 (B, …), masks int64 (B, H, W), boxes a list of {"boxes": float32 (n, 4) in
            pixels of x, "labels": int64 (n,)}. Masks and boxes follow the image.
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        images, form = self.split.images, self.transform
        if isinstance(images, Tensor):
            x = form.fit(images.index_select(0, rows))
        else:
            x = torch.stack([form.fit(images[i]) for i in rows.tolist()])
        x, y = form.change(x, self._labels(rows), self.ids[rows].numpy(), epoch)
        return form.normalise(x), y

    def _labels(self, rows: Tensor) -> Any:
        """Return the labels at some rows as a batch has them, of the images as `fit` leaves
        them."""
        labels, kind = self.split.labels, self.split.kind
        if isinstance(labels, Tensor):
            y = labels[rows]
            if kind == "mask":
                return self.transform.fit_mask(y).long()
            return y if kind == "class" else y.float()
        each = [labels[i] for i in rows.tolist()]
        if kind == "mask":
            return torch.stack([self.transform.fit_mask(mask) for mask in each]).long()
        return [self.transform.fit_boxes(boxes) for boxes in each]

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset; its images keep their ids, and so their augmentation.

        Args:
            positions: int64 (n,).

        Returns:
            The subset, in this order.
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return ImageSet(self.split.take(rows), self.ids[rows], self.transform)

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same images, brought to size and augmented otherwise."""
        return ImageSet(self.split, self.ids, transform)

    def plain(self) -> ImageSet:
        """Return the same images without augmentation."""
        return self.shown(replace(self.transform, augment="none", views=None))

    def relabeled(self, labels: Any) -> ImageSet:
        """Return the same images with other labels, of a kind that `Split` lists."""
        return ImageSet(replace(self.split, labels=labels), self.ids, self.transform)

    def unlabeled(self) -> ImageSet:
        """Return the same images, of which nothing is known: -1, int64 (N,), and no names."""
        return ImageSet(self.split.without_labels(), self.ids, self.transform)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image as a model sees it: (C, H, W)."""
        form = self.transform
        return form.in_chans, form.img_size, form.img_size

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on: which images, and what is done
        to them."""
        targets = self.split.labels
        labels = [targets.numpy().tobytes()] if isinstance(targets, Tensor) else []
        return {
            "images": sha256([self.ids.numpy().tobytes(), *labels]),
            "transform": str(self.transform),
        }


class Concat(ImageSet):
    """Sets one behind another, as one."""

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        ids = torch.cat([part.ids for part in parts])
        super().__init__(join([part.split for part in parts]), ids, parts[0].transform)
        self.parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def domains(self) -> Tensor:
        """Which of the sets each image is of, int64 (N,)."""
        counts = torch.tensor([len(part) for part in self.parts])
        return torch.arange(len(self.parts)).repeat_interleave(counts)

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Tensor, Any]:
        """Return x float32 (B, C, H, W) and y, each image as its own set gives it."""
        rows = torch.as_tensor(positions, dtype=torch.int64)
        owner = torch.from_numpy(np.searchsorted(self._starts, rows.numpy(), side="right") - 1)
        x: Tensor | None = None
        each: dict[int, Any] = {}
        for i in owner.unique().tolist():
            at = (owner == i).nonzero().squeeze(1)
            part, y = self.parts[i].batch(rows[at] - int(self._starts[i]), epoch)
            x = part.new_empty(len(rows), *part.shape[1:]) if x is None else x
            x[at] = part
            each.update(zip(at.tolist(), y, strict=True))
        assert x is not None
        labels = [each[position] for position in range(len(rows))]
        return x, torch.stack(labels) if isinstance(labels[0], Tensor) else labels

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset, the parts in order."""
        rows = torch.as_tensor(positions, dtype=torch.int64).sort().values
        inside = [
            rows[(rows >= a) & (rows < b)] - int(a)
            for a, b in zip(self._starts, self._starts[1:], strict=False)
        ]
        return Concat([part.take(r) for part, r in zip(self.parts, inside, strict=True)])

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same images, brought to size and augmented otherwise."""
        return Concat([part.shown(transform) for part in self.parts])

    def relabeled(self, labels: Any) -> ImageSet:
        """Return the same images with other labels."""
        spans = [
            slice(int(a), int(b)) for a, b in zip(self._starts, self._starts[1:], strict=False)
        ]
        return Concat(
            [part.relabeled(labels[s]) for part, s in zip(self.parts, spans, strict=True)]
        )

    def unlabeled(self) -> ImageSet:
        """Return the same images, of which nothing is known."""
        return Concat([part.unlabeled() for part in self.parts])

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on."""
        return {"parts": str([part.key() for part in self.parts])}


def _each(y: Any) -> list[Any]:
    """Return a batch's labels one by one; a class as a number."""
    if not isinstance(y, Tensor):
        return y
    return y.tolist() if y.dim() == 1 else list(y.unbind())
