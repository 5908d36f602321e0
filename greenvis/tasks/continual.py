"""Metrics of continual learning, as pure functions of the accuracy matrix. Standard library only.

matrix[t][i] is the accuracy on task i's test after training on task t, 0 to 1, tasks counted from
0; None where it was not measured, which makes a metric that needs it None. Libraries differ in what
they call forgetting: the definition is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix) -> float | None:
    """Return the mean accuracy over all tasks after the last (Lopez-Paz and Ranzato, 2017, eq.
    2)."""
    return _mean(matrix[-1])


def averages(matrix: Matrix) -> list[float | None]:
    """Return, after each task, the mean accuracy over the tasks so far: the curve of
    class-incremental papers."""
    return [_mean(row[: t + 1]) for t, row in enumerate(matrix)]


def average_incremental_accuracy(matrix: Matrix) -> float | None:
    """Return the mean of `averages` (Rebuffi et al., 2017)."""
    return _mean(averages(matrix))


def forgetting_by_task(
    matrix: Matrix, definition: Literal["max", "first"] = "max"
) -> list[float | None]:
    """Return what each task but the last lost by the end.

    "max": its best accuracy from when it was learned to before the last task, less that after the
    last (Chaudhry et al., 2018, eq. 3). Negative where the last task helped, unlike the forgetting
    of mammoth and l2p-pytorch, whose best includes the last and what was there before the task was
    learned. "first": its accuracy when it was learned, less the last (avalanche).
    """
    out: list[float | None] = []
    for i, last in enumerate(matrix[-1][:-1]):
        before = [row[i] for row in matrix[i:-1]] if definition == "max" else [matrix[i][i]]
        known = [v for v in before if v is not None]
        out.append(None if last is None or len(known) < len(before) else max(known) - last)
    return out


def forgetting(matrix: Matrix, definition: Literal["max", "first"] = "max") -> float | None:
    """Return the mean of `forgetting_by_task`; None for one task."""
    return _mean(forgetting_by_task(matrix, definition))


def backward_transfer(matrix: Matrix) -> float | None:
    """Return how much later tasks changed the accuracy on earlier ones, on average (Lopez-Paz and
    Ranzato, 2017, eq. 3)."""
    return _mean(None if f is None else -f for f in forgetting_by_task(matrix, "first"))


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float | None:
    """Return how much earlier tasks helped with one not yet learned, on average (Lopez-Paz and
    Ranzato, 2017, eq. 4).

    untrained: the accuracy on each task of a model that learned nothing.
    """
    gains = ((matrix[i - 1][i], untrained[i]) for i in range(1, len(matrix)))
    return _mean(None if after is None else after - before for after, before in gains)


def plasticity(matrix: Matrix) -> float | None:
    """Return the mean accuracy on each task just after it was learned (learning accuracy: Riemer et
    al., 2019)."""
    return _mean(row[t] for t, row in enumerate(matrix))


def joules_per_task(energy_j: Sequence[float | None]) -> float | None:
    """Return the mean energy of a task, joules; energy_j: of each task."""
    return _mean(energy_j)


def energy_normalised_accuracy(matrix: Matrix, energy_j: float) -> float | None:
    """Return the average accuracy in per cent for each kilojoule all tasks took; None where no
    energy is known."""
    final = average_accuracy(matrix)
    return None if final is None or not energy_j > 0 else 100 * final / (energy_j / 1000)


def _mean(values: Iterable[float | None]) -> float | None:
    items = list(values)
    known = [v for v in items if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(items) else None
