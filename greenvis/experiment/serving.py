"""A model as its task has it served, for meters that call it with a batch alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from greenvis.core.example import Example
from greenvis.tasks.base import Task


def images_in(x: Any) -> Tensor:
    """Return the images (batch, channels, height, width) of a batch that may hold more."""
    return x.args[0] if isinstance(x, Example) else x


class Served(nn.Module):
    """Answers a batch as its task does: a detector's list of images, images drawn for labels.

    Args:
        model: The model.
        task: What it answers.
        labels: Of the batch it will be called with, or of its first samples.
    """

    def __init__(self, model: nn.Module, task: Task, labels: Any) -> None:
        super().__init__()
        self.model, self.task, self.labels = model, task, labels

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the task's outputs of (batch, …), or of what an `Example` holds."""
        plain = len(args) == 1 and not kwargs
        x = args[0] if plain else Example(args, kwargs)
        labels = self.labels[: len(x)]
        if isinstance(labels, Tensor):
            labels = labels.to(x.device)
        return self.task.answer(self.model, x, labels)

    def repeated(self, x: Any) -> tuple[nn.Module, Any, float] | None:
        """Return the module that one image of x is made by calling, an example of what it is called
        with, and how often; None where a single forward makes it."""
        part: Any = getattr(self.model, "repeated", None)
        labels = self.labels[: len(x)]
        return None if part is None else part(labels.to(x.device))


def served(model: nn.Module, task: Task, x: Any, labels: Any) -> nn.Module:
    """Return what answers batches like (x, labels): the model itself where it needs no more."""
    plain = isinstance(x, Tensor) and type(task).answer is Task.answer
    return model if plain else Served(model, task, labels)
