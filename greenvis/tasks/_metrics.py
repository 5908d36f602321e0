"""Metrics of own tasks, as torchmetrics has them; imported late, for that takes seconds."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.classification import MulticlassStatScores


class Accuracy(MulticlassStatScores):
    """Top-1 accuracy, 0 to 1, in double precision: torchmetrics's own divides in single.

    Args:
        classes: How many answers there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=max(classes, 2), average="micro", validate_args=False)

    def compute(self) -> Tensor:
        """Return the share of right answers; 0 of none."""
        right, _, _, _, seen = super().compute().double()
        return right / seen.clamp(min=1)
