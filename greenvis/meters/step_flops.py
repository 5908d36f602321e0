"""FLOPs of training steps: counted while the step runs, its numbers untouched, and looked up for those like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis.meters.flop_mode import FlopMode

if TYPE_CHECKING:
    from greenvis.meters.track import Tracker

AGAIN = 8  # a kind of step is counted at its 1st, 2nd, 16th, 128th, … time: a replay buffer fills, tokens are pruned
LONGEST = 1024


class StepFlops:
    """Adds each step's FLOPs to the tracker's current phase. model: what learns, or None where it is not known."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._phase: str | None = None
        self._known: dict[tuple[Any, ...], list[int]] = {}  # kind of step: [FLOPs, times seen, when to count again]
        self._told: set[str] = set()
        self._compiled = _is_compiled(model)

    @contextmanager
    def step(self, tracker: Tracker, batch: Any) -> Iterator[None]:
        """Count or look up the step run inside."""
        if self._compiled:  # a dispatch mode would run it uncompiled: other kernels, other numbers
            self._tell(tracker, "FLOPs of the steps were not counted: the model is compiled; `greenvis flops` counts it")
            yield
            return
        entry = self._known.setdefault(self._kind(tracker, batch), [0, 0, 1])
        entry[1] += 1
        if entry[1] < entry[2]:
            yield
        else:
            entry[2] = min(max(2, entry[1] * AGAIN), entry[1] + LONGEST)
            with FlopMode() as mode:
                yield
            entry[0] = mode.total
            for name in mode.unhandled:
                self._tell(tracker, f"FLOPs of {name} were not counted: no formula is known for it")
        tracker.add(flops=entry[0])

    def _kind(self, tracker: Tracker, batch: Any) -> tuple[Any, ...]:
        phase = tracker.current_phase
        if self._model is not None and phase != self._phase:  # walking the modules costs more than a look at the list
            self._phase, self._parameters = phase, list(self._model.parameters())
        learning = sum(p.requires_grad for p in self._parameters)
        training = self._model is not None and self._model.training
        return (phase.split("/")[0], _shapes(batch), training, learning, torch.is_grad_enabled())

    def _tell(self, tracker: Tracker, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            tracker.note(text)


def _shapes(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple(_shapes(v) for v in batch.values())
    if isinstance(batch, (tuple, list)) and len(batch) < 64:
        return tuple(_shapes(v) for v in batch)
    return ()


def _is_compiled(model: nn.Module | None) -> bool:
    return model is not None and any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()
    )
