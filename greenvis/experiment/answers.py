"""What a model says of images whose labels nobody asks: probabilities, and the features they come
from."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.experiment.knn import head_inputs, head_of
from greenvis.tasks.base import Task


@dataclass(frozen=True)
class Answers:
    """Of each image, on the CPU in float32.

    Attributes:
        logits: (n, classes).
        features: What the classifier is handed, (n, dim); None where they were not asked for.
        labels: As the batches had them, int64 (n,).
    """

    logits: Tensor
    features: Tensor | None
    labels: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Of the classes, (n, classes)."""
        return self.logits.softmax(1)


def answers(
    model: nn.Module, batches: Iterable[Any], task: Task, features: bool = False
) -> Answers:
    """Return what a model answers, in one pass. Its mode is put back.

    Args:
        model: A classifier, as it is served.
        batches: Of (x, y).
        task: Picks the logits.
        features: Whether the classifier's inputs are wanted.

    Raises:
        BadInput: Where features are wanted, and the model shows no classifier.
    """
    device = next(model.parameters()).device
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    hooked = head_inputs(model, head_of(model)) if features else nullcontext([])
    with hooked as inputs, in_mode(model, False), torch.inference_mode():
        for x, y in batches:
            logits.append(task.answer(model, x.to(device), y).float().cpu())
            labels.append(y)
    return Answers(
        torch.cat(logits),
        torch.cat([part.float().cpu() for part in inputs]) if features else None,
        torch.cat(labels),
    )
