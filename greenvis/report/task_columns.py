"""The columns of the table on tasks of continual learning."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import formatting, measures
from greenvis.report.arm_results import ArmResults
from greenvis.report.columns import Column
from greenvis.report.estimates import Summary
from greenvis.report.formatting import MISSING, si
from greenvis.report.shape import Results
from greenvis.tasks.base import Measure


def columns(results: Results) -> list[Column]:
    """Return the columns of the table on tasks."""
    measure = results.measure
    name = measures.written(measure)
    per_kj = f"{measures.title(measure)} (per cent) a kilojoule"
    return [
        _value("average_incremental_accuracy", f"Average incremental {name}", measure),
        _value("forgetting", "Forgetting (best before − last)", measure),
        _value("forgetting_first", "Forgetting (when learned − last)", measure),
        _value("backward_transfer", "Backward transfer", measure),
        _value("plasticity", "Plasticity (each task when learned)", measure),
        _figure("task_energy_j", "Energy a task", "J"),
        *([_figure("accuracy_per_kj", per_kj, "")] if measures.is_share(measure) else []),
        _figure("buffer_bytes", "Replay buffer", "B"),
    ]


def _summary(row: ArmResults, key: str) -> Summary:
    return getattr(row.continual, key, None) or Summary(mean=None, std=None, n=0)


def _mean(key: str) -> Callable[[ArmResults], float | None]:
    return lambda row: _summary(row, key).mean


def _value(key: str, title: str, measure: Measure) -> Column:
    def text(row: ArmResults) -> str:
        s = _summary(row, key)
        if s.mean is None:
            return MISSING
        if not measures.is_share(measure):
            return formatting.spread(measure, s)
        return formatting.fixed(100 * s.mean) + ("" if s.std is None else f" ± {100 * s.std:.1f}")

    head = f"{title}, %" if measures.is_share(measure) else title
    return Column(f"continual_{key}", head, _mean(key), text)


def _figure(key: str, title: str, unit: str) -> Column:
    value = _mean(key)
    return Column(f"continual_{key}", title, value, lambda r: si(value(r), unit))
