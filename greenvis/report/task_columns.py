"""The columns of the table on tasks of continual learning."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import formatting
from greenvis.report.arm_results import ArmResults
from greenvis.report.columns import Column
from greenvis.report.estimates import Summary
from greenvis.report.formatting import MISSING, si


def columns() -> list[Column]:
    """Return the columns of the table on tasks."""
    return [
        _share("average_incremental_accuracy", "Average incremental accuracy"),
        _share("forgetting", "Forgetting (best before − last)"),
        _share("forgetting_first", "Forgetting (when learned − last)"),
        _share("backward_transfer", "Backward transfer"),
        _share("plasticity", "Plasticity (each task when learned)"),
        _figure("task_energy_j", "Energy a task", "J"),
        _figure("accuracy_per_kj", "Accuracy (per cent) a kilojoule", ""),
        _figure("buffer_bytes", "Replay buffer", "B"),
    ]


def _summary(row: ArmResults, key: str) -> Summary:
    return getattr(row.continual, key, None) or Summary(mean=None, std=None, n=0)


def _mean(key: str) -> Callable[[ArmResults], float | None]:
    return lambda row: _summary(row, key).mean


def _share(key: str, title: str) -> Column:
    def text(row: ArmResults) -> str:
        s = _summary(row, key)
        if s.mean is None:
            return MISSING
        return formatting.fixed(100 * s.mean) + ("" if s.std is None else f" ± {100 * s.std:.1f}")

    return Column(f"continual_{key}", f"{title}, %", _mean(key), text)


def _figure(key: str, title: str, unit: str) -> Column:
    value = _mean(key)
    return Column(f"continual_{key}", title, value, lambda r: si(value(r), unit))
