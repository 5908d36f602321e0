"""What a report says of continual learning: the metrics of each arm's accuracy matrix, and accuracy
as tasks come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.report import figures, formatting, stats
from greenvis.report.columns import Column
from greenvis.report.figures import Drawing, short
from greenvis.report.formatting import MISSING, si
from greenvis.tasks import continual as cl_metrics

Row = dict[str, Any]


def summary(
    facts: Mapping[int, Mapping[str, Any]], energy_j: Mapping[int, float]
) -> dict[str, Any]:
    """Return {METRIC: {mean, std, n, …}, "averages", "energy_by_task_j": […]} over seeds.

    facts: of each finished seed that left a matrix. energy_j: of each seed.
    """
    by_key: dict[str, dict[int, float]] = {}
    for seed, fact in facts.items():
        matrix = fact["task_accuracy"]
        spent = energy_j.get(seed)
        values = {
            "average_incremental_accuracy": cl_metrics.average_incremental_accuracy(matrix),
            "forgetting": cl_metrics.forgetting(matrix),
            "forgetting_first": cl_metrics.forgetting(matrix, "first"),
            "backward_transfer": cl_metrics.backward_transfer(matrix),
            "plasticity": cl_metrics.plasticity(matrix),
            "task_energy_j": cl_metrics.joules_per_task(fact.get("task_energy_j") or []),
            "accuracy_per_kj": None
            if spent is None
            else cl_metrics.energy_normalised_accuracy(matrix, spent),
            "buffer_bytes": fact.get("buffer_bytes"),
        }
        for key, value in values.items():
            if isinstance(value, (int, float)):
                by_key.setdefault(key, {})[seed] = value
    curves = [cl_metrics.averages(fact["task_accuracy"]) for fact in facts.values()]
    spent_by_task = [fact["task_energy_j"] for fact in facts.values() if fact.get("task_energy_j")]
    lists = {"averages": _means(curves), "energy_by_task_j": _means(spent_by_task)}
    return {key: stats.summary(by_seed) for key, by_seed in by_key.items()} | lists


def _means(curves: Iterable[list[float | None]]) -> list[float | None]:
    return [
        None if None in column else sum(column) / len(column)
        for column in zip(*curves, strict=False)
    ]


def all_at_once(row: Row) -> bool:
    """Whether an arm trained on all tasks at once (joint), a bound that no stream allows: it knows
    the last accuracy only."""
    before = (row.get("continual") or {}).get("averages", [])[:-1]
    return bool(before) and all(value is None for value in before)


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


def _value(row: Row, key: str, part: str = "mean") -> float | None:
    metric = (row.get("continual") or {}).get(key)
    return metric[part] if metric else None


def _share(key: str, title: str) -> Column:
    def text(row: Row) -> str:
        mean, std = _value(row, key), _value(row, key, "std")
        return (
            MISSING
            if mean is None
            else formatting.fixed(100 * mean) + ("" if std is None else f" ± {100 * std:.1f}")
        )

    return Column(f"continual_{key}", f"{title}, %", lambda r: _value(r, key), text)


def _figure(key: str, title: str, unit: str) -> Column:
    return Column(
        f"continual_{key}", title, lambda r: _value(r, key), lambda r: si(_value(r, key), unit)
    )


def curve(results: dict[str, Any], looks: Mapping[str, dict[str, Any]]) -> Drawing | None:
    """The average accuracy over the tasks so far, as they come: one line an arm."""
    curves = {
        a: (results["arms"][a].get("continual") or {}).get("averages") or []
        for a in results["order"]
    }
    labels = [a for a in results["order"] if sum(v is not None for v in curves[a]) > 1][
        : figures.MOST_ARMS
    ]
    if not labels:
        return None
    figure, [ax] = figures.canvas(height=4.0)
    for a in labels:
        points = [(t + 1, 100 * v) for t, v in enumerate(curves[a]) if v is not None]
        ax.plot(
            [t for t, _ in points], [v for _, v in points], label=short(a), **{**looks[a], "ms": 5}
        )
    ax.set_xlabel("tasks learned")
    ax.set_ylabel("accuracy on them (%)")
    ax.set_xticks(range(1, max(len(curves[a]) for a in labels) + 1))
    figures.legend_below(figure, ax)
    ends = ", ".join(f"{short(a, 40)} {formatting.gain('accuracy', curves[a][-1])}" for a in labels)
    desc = f"Mean accuracy over the tasks learned so far. At the end: {ends}."
    return figures.save(
        figure,
        "accuracy-by-tasks",
        "Accuracy as tasks come",
        desc,
        "Mean over seeds of the tasks so far.",
    )


def growth(results: dict[str, Any], looks: Mapping[str, dict[str, Any]]) -> Drawing | None:
    """The energy of all tasks so far, as they come, and from which number of tasks an arm costs
    less than the baseline."""
    sums = {
        a: _sums((results["arms"][a].get("continual") or {}).get("energy_by_task_j") or [])
        for a in results["order"]
    }
    labels = [a for a in results["order"] if len(sums[a]) > 1][: figures.MOST_ARMS]
    if not labels:
        return None
    figure, [ax] = figures.canvas(height=4.0)
    for a in labels:
        ax.plot(range(1, len(sums[a]) + 1), sums[a], label=short(a), **{**looks[a], "ms": 5})
    ax.set_xlabel("tasks learned")
    ax.set_ylabel("energy of all so far")
    ax.set_xticks(
        range(1, max(len(sums[a]) for a in labels) + 1, 1 + max(len(sums[a]) for a in labels) // 12)
    )
    figures.unit_axis(ax.yaxis, "J")
    figures.legend_below(figure, ax)
    base = results["baseline"]
    texts = [
        cheaper(short(a, 40), sums[a], short(str(base), 40), sums[base])
        for a in labels
        if a != base and sums.get(base)
    ]
    desc = " ".join(
        ["Energy of training and testing, summed over the tasks so far; mean over seeds.", *texts]
    )
    return figures.save(figure, "energy-by-tasks", "Energy as tasks come", desc, desc)


def cheaper(arm: str, costs: list[float], base: str, bases: list[float]) -> str:
    """Return in words from which number of tasks an arm has cost less than the baseline, and keeps
    to it."""
    compared = list(zip(costs, bases, strict=False))
    dearer = [t for t, (a, b) in enumerate(compared, 1) if a >= b]
    if not dearer:
        return f"{arm} costs less than {base} from the first task on."
    if dearer[-1] == len(compared):
        return f"{arm} does not cost less than {base} within {len(compared)} tasks."
    return f"{arm} costs less than {base} from {dearer[-1] + 1} tasks on."


def _sums(values: list[float | None]) -> list[float]:
    out: list[float] = []
    for value in values:
        if value is None:
            return []
        out.append(value + (out[-1] if out else 0.0))
    return out
