"""A target that follows the model as an average of its weights, and gives what a pretext learns
from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from greenvis.core.module_changes import unwatched

_STEPS = "steps"


def momentum_at(step: int, total: int | None, start: float) -> float:
    """Return the share of the target that a step leaves: 1 − (1 − start) · (cos(π step / total) +
    1) / 2, which ends at 1 (BYOL: Grill et al., 2020).

    Args:
        step: Steps taken before, from 0.
        total: Steps of the training; None where nobody knows: it stays where it starts.
        start: Where it starts, 0 to 1.
    """
    if not total:
        return start
    return 1 - (1 - start) * (math.cos(math.pi * min(step, total) / total) + 1) / 2


class MomentumTarget:
    """What a model would answer with an average of the weights it had in training.

    The average is a tensor for each parameter that learns, with which the model's own modules run:
    nothing is added to the model. It has buffers of its own, so statistics of batch norms are those
    of what it was shown. No gradient flows through it.

    Args:
        model: Which learns.
        forward: Of images, through the model and its heads.
        momentum: Share of the target that a step leaves, at the start.
        without: Parameters it does not need, such as a predictor's.

    Attributes:
        steps: Taken so far.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        momentum: float,
        without: Iterable[nn.Parameter] = (),
    ) -> None:
        self._path = _Path(model, forward)
        self._without = {id(p) for p in without}
        self.momentum, self.steps = momentum, 0
        self._weights: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the target answers to images x, without a gradient."""
        self._begin()
        with torch.no_grad(), unwatched():
            return functional_call(self._path, {**self._weights, **self._buffers}, (x,))

    def follow(self, total_steps: int | None) -> None:
        """Take the step's weights into the average; call after each optimizer step.

        Args:
            total_steps: Of the training; None where nobody knows.
        """
        self._begin()
        share = 1 - momentum_at(self.steps, total_steps, self.momentum)
        self.steps += 1
        with torch.no_grad():
            for name, parameter in self._learning().items():
                self._weights[name].lerp_(parameter.detach(), share)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, and of how many steps it is."""
        return {_STEPS: torch.tensor(self.steps), **self._weights, **self._buffers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.steps = int(state[_STEPS])
        if len(state) == 1:  # of a training that has not begun
            return
        for own, named in (
            (self._weights, self._learning()),
            (self._buffers, dict(self._path.named_buffers())),
        ):
            own.update({n: state[n].to(t.device, copy=True) for n, t in named.items()})

    def _begin(self) -> None:
        """Begin with the weights there are when it is first needed."""
        if not self._weights:
            self._weights = {n: p.detach().clone() for n, p in self._learning().items()}
            self._buffers = {n: b.detach().clone() for n, b in self._path.named_buffers()}

    def _learning(self) -> dict[str, nn.Parameter]:
        return {
            n: p
            for n, p in self._path.named_parameters()
            if p.requires_grad and id(p) not in self._without
        }


class _Path(nn.Module):
    """A way through a model, as a module that can run with other weights."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._path = model, (forward,)  # which may be a module, too

    def forward(self, x: Any) -> Tensor:
        return self._path[0](x)
