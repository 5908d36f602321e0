"""The random state of a moment, to draw the same numbers once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


class RandomState:
    """torch's random state as it is now, on the CPU and on the device of a model."""

    def __init__(self, model: nn.Module) -> None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._cuda = device if device.type == "cuda" else None
        self._states = self._now()

    def _now(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = None if self._cuda is None else torch.cuda.get_rng_state(self._cuda)
        return torch.get_rng_state(), cuda

    def _put(self, states: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None and self._cuda is not None:
            torch.cuda.set_rng_state(states[1], self._cuda)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw within what was drawn after this state was taken; afterwards go on as if nothing had
        been drawn."""
        now = self._now()
        self._put(self._states)
        try:
            yield
        finally:
            self._put(now)
