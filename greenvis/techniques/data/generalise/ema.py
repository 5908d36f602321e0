"""Averaged weights: the model answers with an exponential moving average of its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.techniques._shared.attach import precise

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


class InstalledEma(Installed):
    """The average, by name of the parameter or buffer."""

    def __init__(self, request: Ema, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self.count = 0
        self.average: dict[str, Tensor] = {}
        # the tensors it is of, which `merge` meets when the model has other names
        self._tensors: dict[str, Tensor] = {}

    def step_end(self) -> None:
        """Take the step's weights into the average."""
        keep = decay_at(self.count, self.request.decay, self.request.warmup)
        self.count += 1
        self._tensors = self._learning()
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                now = tensor.detach().to(precise(tensor))
                if name not in self.average:
                    self.average[name] = now.clone()
                else:
                    self.average[name].lerp_(now, 1 - keep)

    def _learning(self) -> dict[str, Tensor]:
        """Return what changes in training: parameters that train, and buffers with fractions."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {
            f"{path}.{name}" if path else name: buffer
            for path, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
            if name not in module._non_persistent_buffers_set
        }
        return {**named, **buffers}

    @contextmanager
    def served(self) -> Iterator[None]:
        """Hold the average in the model."""
        before = {n: t.detach().clone() for n, t in self._tensors.items()}
        self.merge()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._tensors.items():
                    tensor.copy_(before[name])

    def merge(self) -> None:
        """Leave the average in the model."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, and of how many steps it is."""
        average = {f"average.{n}": t for n, t in self.average.items()}
        return {_COUNT: torch.tensor(self.count), **average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.count = int(state[_COUNT])
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        prefix = "average."
        stored = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        self._tensors = {n: named[n] for n in stored}
        self.average = {n: t.to(named[n].device, copy=True) for n, t in stored.items()}
