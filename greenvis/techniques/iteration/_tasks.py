"""What techniques for streams of tasks share: the task loss within a task's own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def within(logits: Tensor, y: Tensor, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return logits and labels among `classes` and those in `y` alone, as if all other logits were minus infinity.

    logits: (batch, all classes). y: int64 (batch,). Leaving the others out, in place of filling in, keeps label smoothing
    finite.
    """
    there = torch.cat([torch.as_tensor(classes, dtype=y.dtype, device=y.device), y.flatten()]).unique()  # sorted
    return logits[:, there], torch.searchsorted(there, y)


class OwnClasses:
    """A task loss that sees the logits of the current task's classes only; with no task begun, of all."""

    def __init__(self) -> None:
        self.classes: tuple[int, ...] = ()

    def __call__(self, task_loss: Any) -> Any:
        """Return `task_loss` within the task's classes; soft labels (batch, classes) are left as they are."""

        def loss(logits: Tensor, y: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self.classes and isinstance(y, Tensor) and not y.is_floating_point() and max(self.classes) < logits.shape[1]:
                logits, y = within(logits, y, self.classes)
            return task_loss(logits, y, *args, **kwargs)

        return loss
