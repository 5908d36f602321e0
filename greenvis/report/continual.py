"""Continual learning over seeds: the metrics of each run's accuracy matrix, and accuracy and energy
as tasks come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.report import stats
from greenvis.report.arm_results import Continual
from greenvis.report.facts import Facts
from greenvis.tasks import continual as cl_metrics


def summary(facts: Mapping[int, Facts], energy_j: Mapping[int, float | None]) -> Continual:
    """Return the metrics of continual learning over those seeds that left a matrix.

    facts, energy_j: of each finished seed.
    """
    by_key: dict[str, dict[int, float]] = {}
    matrices = {seed: fact.task_accuracy for seed, fact in facts.items() if fact.task_accuracy}
    for seed, matrix in matrices.items():
        fact, spent = facts[seed], energy_j.get(seed)
        values = {
            "average_incremental_accuracy": cl_metrics.average_incremental_accuracy(matrix),
            "forgetting": cl_metrics.forgetting(matrix),
            "forgetting_first": cl_metrics.forgetting(matrix, "first"),
            "backward_transfer": cl_metrics.backward_transfer(matrix),
            "plasticity": cl_metrics.plasticity(matrix),
            "task_energy_j": cl_metrics.joules_per_task(fact.task_energy_j),
            "accuracy_per_kj": None
            if spent is None
            else cl_metrics.energy_normalised_accuracy(matrix, spent),
            "buffer_bytes": fact.numbers.get("buffer_bytes"),
        }
        for key, value in values.items():
            if isinstance(value, (int, float)):
                by_key.setdefault(key, {})[seed] = value
    curves = [cl_metrics.averages(matrix) for matrix in matrices.values()]
    spent_by_task = [facts[s].task_energy_j for s in matrices if facts[s].task_energy_j]
    return Continual(
        averages=_means(curves),
        energy_by_task_j=_means(spent_by_task),
        **{key: stats.summary(by_seed) for key, by_seed in by_key.items()},
    )


def mean_matrix(matrices: list[list[list[Any]]]) -> list[list[float | None]]:
    """Return the mean of those matrices that have as many tasks as the first."""
    tasks = len(matrices[0])
    same = [m for m in matrices if len(m) == tasks]
    return [[_mean_at(same, t, i) for i in range(tasks)] for t in range(tasks)]


def _mean_at(matrices: list[list[list[Any]]], t: int, i: int) -> float | None:
    values = [m[t][i] for m in matrices if i < len(m[t]) and isinstance(m[t][i], (int, float))]
    return math.fsum(values) / len(values) if len(values) == len(matrices) else None


def _means(curves: Iterable[list[float | None]]) -> list[float | None]:
    return [
        None if None in column else sum(column) / len(column)
        for column in zip(*curves, strict=False)
    ]
