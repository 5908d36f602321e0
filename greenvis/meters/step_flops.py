"""FLOPs of training steps: counted while the step runs, its numbers untouched, and looked up for
those like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis.meters.flop_mode import FlopMode

if TYPE_CHECKING:
    from greenvis.meters.track import Tracker

# a kind of step is counted at its 1st, 64th, 4096th, … time: a replay buffer fills, tokens are
# pruned
AGAIN = 64
LONGEST = 16384
LOOK_EVERY = 16  # steps between two looks at which parameters learn: there are hundreds of them


@dataclass
class _Kind:
    """What is known of one kind of step: FLOPs by phase below the step's own ("/teacher"), and when
    to look again."""

    flops: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    next_look: int = 1
    phase: str = ""


class StepFlops:
    """Adds each step's FLOPs to the phases they were done in. model: what learns, or None where it
    is not known."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._phase: str | None = None
        self._steps = self._learning = 0
        self._known: dict[tuple[Any, ...], _Kind] = {}
        self._reported: set[str] = set()
        self._compiled = _is_compiled(model)

    def step(self, tracker: Tracker, batch: Any) -> AbstractContextManager[Any]:
        """Return a context that counts, or looks up, the step run inside."""
        if self._compiled:  # a dispatch mode would run it uncompiled: other kernels, other numbers
            self._tell(
                tracker,
                "FLOPs of the steps were not counted: the model is compiled; `greenvis flops` "
                "counts it",
            )
            return nullcontext()
        phase = tracker.current_phase
        kind = self._known.setdefault(self._key(phase, batch), _Kind())
        kind.steps += 1
        if kind.steps < kind.next_look and kind.phase == phase:
            for below, flops in kind.flops.items():
                tracker.add(phase + below, flops=flops)
            return nullcontext()
        # also at the first step of an epoch: outputs may be cached by then
        return self._counted(tracker, kind, phase)

    @contextmanager
    def _counted(self, tracker: Tracker, kind: _Kind, phase: str) -> Iterator[None]:
        if kind.steps >= kind.next_look:
            kind.next_look = min(kind.steps * AGAIN, kind.steps + LONGEST)
        kind.phase = phase
        with FlopMode(lambda: tracker.current_phase) as mode:
            yield
        kind.flops = {path.removeprefix(phase): n for path, n in mode.by_phase.items()}
        for name in mode.unhandled:
            self._tell(tracker, f"FLOPs of {name} were not counted: no formula is known for it")
        for below, flops in kind.flops.items():
            tracker.add(phase + below, flops=flops)

    def _key(self, phase: str, batch: Any) -> tuple[Any, ...]:
        model = self._model
        if model is not None:
            if phase != self._phase:  # walking the modules costs more than a look at the list
                self._phase, self._parameters, self._steps = phase, list(model.parameters()), 0
            if self._steps % LOOK_EVERY == 0:
                self._learning = sum(p.requires_grad for p in self._parameters)
            self._steps += 1
        training = model is not None and model.training
        return (
            phase.partition("/")[0],
            _shapes(batch),
            training,
            self._learning,
            torch.is_grad_enabled(),
        )

    def _tell(self, tracker: Tracker, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
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
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
