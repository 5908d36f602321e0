"""Averaged weights: the model answers with an exponential moving average of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.core.technique import Installed, Technique
from greenvis.techniques.data.generalise._average import Averaging, Mean

_COUNT = "count"


def decay_at(step: int, decay: float, warmup: bool = True) -> float:
    """Return the share of the average that stays at a step.

    min(decay, (1 + step) / (10 + step)), as TensorFlow's ExponentialMovingAverage has it, so that
    the first weights are soon forgotten; decay itself without warm-up.

    Args:
        step: Steps taken before, from 0.
        decay: Where it ends.
        warmup: Whether it begins lower.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Ema(Technique):
    """Answer with an exponential moving average of the weights of training (Polyak and Juditsky,
    1992; Tarvainen and Valpola, 2017).

    Costs a copy of what trains and a sum a step, no forward: served it is the model's own size and
    speed. Often worth some epochs of a schedule that ends at a low learning rate, and little where
    the learning rate goes to zero anyway. Statistics of batch norms are averaged alike. Evaluations
    are of the average, and `merge` leaves it in the model; training goes on with the plain weights.
    In a loop of your own evaluate within `live.served()`.

    Example:
        >>> live = gv.wrap(model, gv.Ema(decay=0.99))
        >>> live.step_end()  # after each optimizer step
        >>> with live.served() as averaged:
        ...     answers = averaged.eval()(x)
    """

    name = "ema"
    stage = "objective"
    examples: ClassVar = ({}, {"decay": 0.5, "warmup": False})

    decay: float = Field(
        default=0.999, ge=0, lt=1, description="share of the average that a step leaves"
    )
    warmup: bool = Field(
        default=True, description="begin with a smaller share: (1 + step) / (10 + step)"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledEma(self, model)


class InstalledEma(Averaging):
    """The average, by name of the parameter or buffer."""

    def __init__(self, request: Ema, model: nn.Module) -> None:
        super().__init__(model)
        self.request, self.mean = request, Mean()

    def step_end(self) -> None:
        """Take the step's weights into the average."""
        keep = decay_at(self.mean.count, self.request.decay, self.request.warmup)
        self.mean.count += 1
        self.tensors = self.learning()
        self.mean.mix(self.tensors, 1 - keep)

    def average(self) -> Mapping[str, Tensor]:
        """Return the average; none before the first step."""
        return self.mean.values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, and of how many steps it is."""
        return {_COUNT: torch.tensor(self.mean.count), **prefixed("average.", self.mean.values)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.mean = Mean(self.take(below(state, "average.")), int(state[_COUNT]))
