"""Continual learning: the metric and energy as tasks come, and the metric by task."""

from __future__ import annotations

from greenvis.report import figures, formatting, measures
from greenvis.report.figures import Drawing, Label, short
from greenvis.report.looks import few, looks, scale
from greenvis.report.shape import Results


def curve(results: Results) -> Drawing | None:
    """The mean of the metric over the tasks so far, as they come: one line an arm."""
    curves = {a: row.continual.averages for a, row in results.rows.items() if row.continual}
    drawable = [a for a, values in curves.items() if sum(v is not None for v in values) > 1]
    labels, rest = few(results, drawable)
    if not labels:
        return None
    styles, measure, k = looks(results), results.measure, scale(results)
    figure, [ax] = figures.canvas(height=4.0)
    names = []
    for a in labels:
        points = [(t + 1, k * v) for t, v in enumerate(curves[a]) if v is not None]
        xs, ys = [t for t, _ in points], [v for _, v in points]
        ax.plot(xs, ys, gid=f"arm{results.order.index(a)}", **{**styles[a], "ms": 5})
        names.append(Label(short(a, 16), styles[a]["color"], xs[-1], ys[-1]))
    ax.set_xlabel("tasks learned")
    unit = "%" if measures.is_share(measure) else measures.suffix(measure).strip()
    ax.set_ylabel(f"{measures.written(measure)} on them" + (f" ({unit})" if unit else ""))
    ax.set_xticks(range(1, max(len(curves[a]) for a in labels) + 1))
    figures.label_ends(ax, names)
    ends = ", ".join(f"{short(a, 40)} {formatting.gain(measure, curves[a][-1])}" for a in labels)
    desc = f"Mean {measures.written(measure)} over the tasks learned so far. At the end: {ends}."
    return figures.save(
        figure,
        "accuracy-by-tasks",
        f"{measures.title(measure)} as tasks come",
        desc + rest,
        "Mean over seeds of the tasks so far." + rest,
    )


def growth(results: Results) -> Drawing | None:
    """The energy of all tasks so far, as they come, and from which number of tasks an arm costs
    less than the baseline."""
    sums = {
        a: _sums(row.continual.energy_by_task_j) for a, row in results.rows.items() if row.continual
    }
    labels, rest = few(results, [a for a, values in sums.items() if len(values) > 1])
    if not labels:
        return None
    styles, names = looks(results), []
    figure, [ax] = figures.canvas(height=4.0)
    for a in labels:
        xs = range(1, len(sums[a]) + 1)
        ax.plot(xs, sums[a], gid=f"arm{results.order.index(a)}", **{**styles[a], "ms": 5})
        names.append(Label(short(a, 16), styles[a]["color"], xs[-1], sums[a][-1]))
    ax.set_xlabel("tasks learned")
    ax.set_ylabel("energy of all so far")
    ax.set_xticks(
        range(1, max(len(sums[a]) for a in labels) + 1, 1 + max(len(sums[a]) for a in labels) // 12)
    )
    figures.unit_axis(ax.yaxis, "J")
    figures.label_ends(ax, names)
    base = results.baseline
    texts = [
        cheaper(short(a, 40), sums[a], short(base, 40), sums[base])
        for a in labels
        if base is not None and a != base and sums.get(base)
    ]
    desc = " ".join(
        ["Energy of training and testing, summed over the tasks so far; mean over seeds.", *texts]
    )
    desc += rest
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


def task_matrix(results: Results, label: str, i: int) -> Drawing | None:
    """The metric on each task after learning each task, for continual learning."""
    matrix, measure = results.arms[label].task_accuracy, results.measure
    if not matrix:
        return None
    from matplotlib import colormaps

    n, scaled = len(matrix), scale(results)
    most = (
        1.0 if measures.is_share(measure) else max(v or 0.0 for row in matrix for v in row) or 1.0
    )
    figure, [ax] = figures.canvas(height=min(5.2, 1.6 + 0.5 * n))
    colours = colormaps["viridis"]
    for t in range(n):
        for k in range(n):
            v = matrix[t][k]
            if v is None:
                continue
            r, g, b, _ = colours(min(1.0, max(0.0, v / most)))
            ax.fill(
                [k - 0.5, k + 0.5, k + 0.5, k - 0.5],
                [t - 0.5, t - 0.5, t + 0.5, t + 0.5],
                color=(r, g, b),
                lw=0,
            )
            dark = 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.45
            if n <= 12:
                ax.text(
                    k,
                    t,
                    f"{v * scaled:.0f}" if measures.is_share(measure) else formatting.figures(v, 2),
                    ha="center",
                    va="center",
                    color="#fefefe" if dark else "#010101",
                    fontsize=10,
                )
    ax.set_xticks(range(n), [str(k + 1) for k in range(n)])
    ax.set_yticks(range(n), [str(k + 1) for k in range(n)])
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_ylim(n - 0.5, -0.5)
    ax.grid(visible=False)
    ax.set_xlabel("task tested")
    ax.set_ylabel("after learning task")
    last = ", ".join(formatting.gain(measure, v) for v in matrix[-1])
    name = measures.written(measure)
    unit = "per cent" if measures.is_share(measure) else measures.suffix(measure).strip()
    desc = (
        f"{short(label, 60)}: {name}{f' in {unit}' if unit else ''} on each task (column) after "
        f"each task was learned (row). At the end: {last}."
    )
    return figures.save(
        figure,
        f"tasks-{i}",
        f"{measures.title(measure)} by task: {short(label, 40)}",
        desc,
        f"{unit[:1].upper()}{unit[1:]}, mean over seeds." if unit else "Mean over seeds.",
    )
