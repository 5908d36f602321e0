"""How far a training has come, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from greenvis.core.wrap import Wrapped

_Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """How far a training has come; saved in its checkpoint.

    Attributes:
        part: Which of the parts it is in.
        epoch: Of the part, ended.
        batch: Of the epoch, ended.
        step: Of the optimizer, ended.
        batches: Of all parts, ended.
        losses: Of the epoch's batches so far, the sum of losses by weight, and that of weights.
        metrics: Of the last evaluation, by name.
        reached: Whether that reached the target.
        rows: Of a stream, the primary metric on each experience's test, a row an experience.
        observed: What each experience, or round, took; None where it was interrupted.
        rounds: Of labels bought in rounds, {"labels": all so far, and the metrics} after each.
    """

    part: _Count = 0
    epoch: _Count = 0
    batch: _Count = 0
    step: _Count = 0
    batches: _Count = 0
    losses: tuple[float, float] = (0.0, 0.0)
    metrics: dict[str, float] = field(default_factory=dict)
    reached: bool = False
    rows: dict[str, list[list[float | None]]] = field(default_factory=dict)
    observed: list[dict[str, float] | None] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How a training ended; the model is in eval mode on its device.

    Attributes:
        live: The model, with the last part's techniques on it.
        metrics: Of the last evaluation, by name.
        epochs: Trained; of a stream, on each experience.
        reached: Whether the last evaluation reached the target.
        delta: What it changed or added, by name.
        rows: Of a stream, "task_accuracy" and "task_accuracy_known": the primary metric on each
            experience's test, a row an experience. None where it was not measured.
        observed: What each experience of a stream, or round, took; None where it was interrupted.
        rounds: Of labels bought in rounds, {"labels": all so far, and the metrics} after each.
    """

    live: Wrapped
    metrics: dict[str, float]
    epochs: int
    reached: bool
    delta: dict[str, Tensor]
    rows: dict[str, list[list[float | None]]]
    observed: list[dict[str, float] | None]
    rounds: list[dict[str, float]]
