"""A data set as batches: order and augmentation depend on seed and epoch only, whatever the
workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from greenvis.data.image_set import ImageSet
from greenvis.data.transforms import mix
from greenvis.errors import BadInput


def order(length: int, *, epoch: int = 0, seed: int = 0, shuffle: bool = False) -> Tensor:
    """Return the positions in the order an epoch visits them: a function of the arguments alone.

    Args:
        length: Images.
        epoch: From 0.
        seed: Of the shuffling.
        shuffle: Whether the order is random.

    Returns:
        int64 (length,).
    """
    if not shuffle:
        return torch.arange(length)
    key = int(mix(np.array([epoch]), seed)[0] >> np.uint64(1))
    return torch.randperm(length, generator=torch.Generator().manual_seed(key))


class _Epoch(Dataset[Any]):
    """A data set at one epoch, which gives whole batches: (x, y), or (x, y, positions)."""

    def __init__(self, dataset: Dataset[Any], epoch: int, positions: bool) -> None:
        self.dataset, self.epoch, self.positions = dataset, epoch, positions

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, positions: list[int]) -> tuple[Any, ...]:
        if isinstance(self.dataset, ImageSet):
            batch = self.dataset.batch(positions, self.epoch)
        else:
            batch = tuple(default_collate([self.dataset[i] for i in positions]))
        return (*batch, torch.tensor(positions)) if self.positions else batch


def _identity(batch: Any) -> Any:
    return batch


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    start: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    positions: bool = False,
    visits: Tensor | None = None,
) -> DataLoader[Any]:
    """Return one epoch's loader.

    Order and augmentation depend on seed and epoch only, whatever the workers. torch's global
    random state is not touched.

    Args:
        dataset: Any map-style data set.
        batch_size: Samples per batch.
        epoch: From 0.
        seed: Of the shuffling.
        shuffle: Whether the order is random.
        start: Batches to pass over unread, so that a run resumes where it was.
        workers: Processes that load.
        drop_last: Whether a smaller last batch is left out.
        positions: Whether batches also say where their samples stand.
        visits: Which samples to show, in this order, some perhaps more than once: int64 (n,). By
            default each once.

    Returns:
        A loader of (x float32 (B, C, H, W), y int64 (B,)); with `positions`, also int64 (B,).

    Raises:
        BadInput: For a batch size below 1 or a start below 0.
    """
    if batch_size < 1 or start < 0:
        raise BadInput(
            f"batches: batch_size is {batch_size} and start {start}; they must be at least 1 and 0"
        )
    if visits is None:
        length = len(dataset)  # type: ignore[arg-type]
        visits = order(length, epoch=epoch, seed=seed, shuffle=shuffle)
    return DataLoader(
        _Epoch(dataset, epoch, positions),
        batch_sampler=BatchSampler(visits[start * batch_size :].tolist(), batch_size, drop_last),
        collate_fn=_identity,
        num_workers=workers,
        generator=torch.Generator(),
    )
