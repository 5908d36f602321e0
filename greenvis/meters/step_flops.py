"""FLOPs of training steps: counted while the step runs, its numbers untouched, and looked up for those like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis.meters.flop_mode import FlopMode

if TYPE_CHECKING:
    from greenvis.meters.track import Tracker

AGAIN = 8  # a kind of step is counted at its 1st, 2nd, 16th, 128th, … time: a replay buffer fills, tokens are pruned
LONGEST = 1024


@dataclass
class _Kind:
    """What is known of one kind of step: FLOPs by phase below the step's own ("/teacher"), and when to look again."""

    flops: dict[str, int] = field(default_factory=dict)
    seen: int = 0
    next_look: int = 1
    phase: str = ""


class StepFlops:
    """Adds each step's FLOPs to the phases they were done in. model: what learns, or None where it is not known."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._phase: str | None = None
        self._known: dict[tuple[Any, ...], _Kind] = {}
        self._told: set[str] = set()
        self._compiled = _is_compiled(model)

    @contextmanager
    def step(self, tracker: Tracker, batch: Any) -> Iterator[None]:
        """Count or look up the step run inside."""
        if self._compiled:  # a dispatch mode would run it uncompiled: other kernels, other numbers
            self._tell(tracker, "FLOPs of the steps were not counted: the model is compiled; `greenvis flops` counts it")
            yield
            return
        phase = tracker.current_phase
        kind = self._known.setdefault(self._key(phase, batch), _Kind())
        kind.seen += 1
        if kind.seen < kind.next_look and kind.phase == phase:
            yield
        else:  # also at the first step of each epoch: outputs may come from a cache by then
            if kind.seen >= kind.next_look:
                kind.next_look = min(max(2, kind.seen * AGAIN), kind.seen + LONGEST)
            kind.phase = phase
            with FlopMode(lambda: tracker.current_phase) as mode:
                yield
            kind.flops = {place.removeprefix(phase): n for place, n in mode.by_place.items()}
            for name in mode.unhandled:
                self._tell(tracker, f"FLOPs of {name} were not counted: no formula is known for it")
        for below, flops in kind.flops.items():
            tracker.add(phase + below, flops=flops)

    def _key(self, phase: str, batch: Any) -> tuple[Any, ...]:
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
