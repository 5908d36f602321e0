"""Metrics that keep rows of every sample, on several processes of which some have had none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class RowMetric(Metric):
    """A metric with states that are lists of rows; where a process has none, it adds none."""

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, Tensor] = {}

    def add_rows(self, name: str, dims: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Add a state, a list of tensors.

        Args:
            name: Of the state.
            dims: Axes of its tensors, the rows' first.
            dtype: Of its tensors.
        """
        self.add_state(name, [], joined)
        self._empty[name] = torch.zeros((0,) * dims, dtype=dtype)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # all processes gather tensors of as many axes and of one dtype, or none of them returns
        for name, empty in self._empty.items():
            rows = getattr(self, name)
            setattr(self, name, [joined(rows) if len(rows) else empty.to(self.device)])
        super()._sync_dist(*args, **kwargs)


def joined(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Return rows as one tensor; without those of processes that had none."""
    if isinstance(rows, Tensor):
        return rows
    some = [part for part in rows if part.numel()] or list(rows[:1])
    return torch.cat(some)
