"""What the techniques that learn from answers to unlabelled images have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.technique import Installed, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks.answers import UNKNOWN


class Unlabelled(Installed):
    """Unlabelled images behind the labelled ones of each batch.

    Args:
        name: Of the technique, which its term and its facts begin with.
        model: The model.
        weight: Factor of the term.
        warmup: Share of the training in which the factor grows.

    Attributes:
        steps: Taken so far.
    """

    wants = ("unlabeled",)

    def __init__(self, name: str, model: nn.Module, weight: float, warmup: float) -> None:
        super().__init__()
        self.name, self.model, self.weight, self.warmup = name, model, weight, warmup
        self.steps = 0
        self._rows: slice | None = None  # of the batch, those put in here
        self._weighed: Tensor | None = None  # mean weight of the images, summed over the steps

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def check(self, x: Any, y: Any) -> None:
        """Raise BadInput for a batch that is no images of one class each."""
        if not isinstance(x, Tensor) or y.dim() != 1 or y.is_floating_point():
            raise BadInput(f"{self.name} takes images (batch, …) of one class each, int64 (batch,)")

    def put_behind(self, x: Tensor, y: Tensor, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the batch with images of no known label behind it."""
        count = sum(map(len, views))
        self._rows = slice(len(x), len(x) + count)
        return torch.cat([x, *views]), torch.cat([y, y.new_full((count,), UNKNOWN)])

    def answers(self, logits: Tensor | None) -> Tensor:
        """Return the logits of the images put in, float32 (images, classes)."""
        if self._rows is None or logits is None:
            raise GreenvisError(
                f"{self.name} puts images into the batch: call batch(x, y) of the wrapped model "
                "before its forward"
            )
        return logits_of(logits)[self._rows].float()

    def term(self, loss: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the term of a loss, and note how much the images counted.

        Args:
            loss: A scalar.
            weights: Of each image, or their mean.
        """
        if not self.repeated:
            self._weighed = weights.detach().mean() + (
                0.0 if self._weighed is None else self._weighed
            )
        ramp = 1.0
        if self.warmup and self.total_steps:
            ramp = min(1.0, self.steps / (self.warmup * self.total_steps))
        return {self.name: self.weight * ramp * loss}

    def step_end(self) -> None:
        """Count the step."""
        self.steps += 1
        self._rows = None

    def facts(self) -> Mapping[str, Any]:
        """Return the mean weight of an unlabelled image (the share that was sure, where weights are
        0 or 1), over the training."""
        if self._weighed is None or not self.steps:
            return {}
        return {f"{self.name}_sure": round(float(self._weighed) / self.steps, 4)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the steps taken, and what was sure in them."""
        weighed = torch.zeros(()) if self._weighed is None else self._weighed.detach().cpu()
        return {"steps": torch.tensor(self.steps), "sure": weighed}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.steps = int(state["steps"])
        self._weighed = state["sure"].to(self.device, copy=True)
