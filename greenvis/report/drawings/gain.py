"""The metric against energy: of the whole line, and over the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from greenvis.report import comparison, figures, formatting, frontier, measures, verdict
from greenvis.report.estimates import ToTarget
from greenvis.report.figures import Drawing, Label, short
from greenvis.report.looks import axis, few, looks, most, scale
from greenvis.report.runs import Curve
from greenvis.report.shape import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gain_vs_energy(results: Results) -> Drawing | None:
    """The metric against the energy of the whole line, with spread over seeds and the front of the
    means."""
    measure, arms = results.measure, results.arms
    points = {
        a: (x, y)
        for a, row in results.rows.items()
        if (x := row.train_energy_with_reuse_j.value) is not None
        and (y := row.gain.mean) is not None
    }
    if not points:
        return None
    k, front = scale(results), _frontier(results, points)
    figure, [ax] = figures.canvas(height=3.9)
    styles = looks(results)
    named, rest = most(list(points))
    if len(front) > 1:
        ax.plot(
            [points[a][0] for a in front],
            [points[a][1] * k for a in front],
            color=figures.MUTED,
            lw=1.2,
            ls="--",
            zorder=1,
        )
    others = [points[a] for a in points if a not in named]
    if others:
        ax.plot(
            [x for x, _ in others],
            [y * k for _, y in others],
            "o",
            ms=3,
            color=figures.GRID,
            mec=figures.MUTED,
            mew=0.5,
        )
    spans = []
    for a in named:
        spans += _draw_arm(ax, results, a, (points[a][0], points[a][1] * k), k)
    lost = comparison.allowed(results)
    limit = points.get(str(results.baseline))
    decided = limit is not None and results.comparisons > 0
    if limit is not None and decided:
        sign = -1 if results.lower_is_better else 1
        ax.axhline((limit[1] - sign * lost) * k, color=figures.MUTED, lw=1, ls=":", zorder=1)
    reused = any(row.uses for row in arms.values())
    energy = "energy, base and teacher included" if reused else "training energy"
    ax.set_xlabel(f"{energy} (less is better)")
    ax.set_ylabel(axis(results))
    ax.margins(0.14)
    if measures.is_share(measure):
        bottom, top = ax.get_ylim()
        ax.set_ylim(max(bottom, -2.0), min(top, 102.0))
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.label_points(
        ax,
        [Label(short(a, 18), styles[a]["color"], points[a][0], points[a][1] * k) for a in named],
        spans,
    )
    what = "; ".join(
        f"{short(a, 40)} {formatting.gain(measure, points[a][1])} for "
        f"{formatting.si(points[a][0], 'J')}"
        for a in named
    )
    caption = _caption(results, len(front) > 1, decided) + rest
    title = f"{measures.title(measure)} against {energy}"
    return figures.save(figure, "gain-vs-energy", title, f"{what}. {caption}", caption)


def _draw_arm(
    ax: Axes, results: Results, arm: str, at: tuple[float, float], k: float
) -> list[tuple[float, float, float, float]]:
    """Draw an arm's mark with its intervals, and return where these run: from (x, y) to (x, y)."""
    (x, y), look = at, {**looks(results)[arm], "linestyle": "none", "ms": 8}
    ax.plot(x, y, zorder=3, gid=f"arm{results.order.index(arm)}", **look)
    bars = _bars(results, arm, x, k)
    error: Any = {key: [[low], [high]] for key, low, high in bars if low or high}
    ax.errorbar(x, y, fmt="none", ecolor=look["color"], capsize=3, elinewidth=1.2, **error)
    return [
        (x - low, y, x + high, y) if key == "xerr" else (x, y - low, x, y + high)
        for key, low, high in bars
    ]


def _bars(results: Results, arm: str, x: float, k: float) -> list[tuple[str, float, float]]:
    """Return the intervals of an arm as they stand in tables, about its means: how far each reaches
    to both sides. k: of a unit of the metric on its axis."""
    row = results.arms[arm]
    ratio, d = row.ratio("train_energy_with_reuse"), row.difference
    out = []
    if ratio and ratio.low is not None and ratio.high is not None and ratio.ratio > 0:
        near, far = min(ratio.low, ratio.ratio), min(max(ratio.high, ratio.ratio), 10 * ratio.ratio)
        out.append(("xerr", x * (1 - near / ratio.ratio), x * (far / ratio.ratio - 1)))
    if d and d.low is not None and d.high is not None:
        out.append(("yerr", k * (d.mean - d.low), k * (d.high - d.mean)))
    return out


def _frontier(results: Results, points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the frontier of plain training; none where fewer than two arms are plain, or all."""
    plain = {a: row for a, row in frontier.plain_arms(results).items() if a in points}
    several = frontier.LEAST <= len(plain) < len(points)
    return frontier.on_front(results, plain) if several else []


def _caption(results: Results, front: bool, decided: bool) -> str:
    parts = [
        "Bars: 95\u00a0% intervals of what an arm is beside the baseline."
        if decided
        else "No interval is known.",
        "Dashed: frontier of plain training." if front else "",
        f"Dotted: what is kept, the baseline less {verdict.margin(results) or 'nothing'}; a bar "
        "across it is not yet decided."
        if decided
        else "",
    ]
    return " ".join(p for p in parts if p) + verdict.not_counted(*results.arms.values())


def energy_to_gain(results: Results) -> Drawing | None:
    """The metric over the energy spent so far: one line an arm."""
    measure, curves = results.measure, {a: results.arms[a].curve for a in results.order}
    drawable = [a for a in results.order if any(len(c) > 1 for c in curves[a].values())]
    if not drawable:
        return None
    labels, rest = few(results, drawable)
    k = scale(results)
    figure, [ax] = figures.canvas()
    styles, ends = looks(results), []
    for a in labels:
        line = _mean([c for _, c in sorted(curves[a].items()) if len(c) > 1])
        xs, ys = [j for j, _ in line], [y * k for _, y in line]
        ax.plot(xs, ys, gid=f"arm{results.order.index(a)}", **{**styles[a], "ms": 4})
        ends.append(Label(short(a, 16), styles[a]["color"], xs[-1], ys[-1]))
    reached = {a: e for a in drawable if (e := results.arms[a].energy_to_baseline_j)}
    target = next((e.target for e in reached.values()), None)
    if target is not None:
        ax.axhline(target * k, color=figures.MUTED, lw=1, ls=":")
        rest += f" Dotted: the final {measures.written(measure)} of {results.baseline}."
    ax.set_xlabel("energy of own training so far")
    ax.set_ylabel(axis(results))
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.label_ends(ax, ends)
    desc = "Mean over seeds, own training only."
    if whens := [f"{short(a, 40)} {_when(reached[a])}" for a in labels if a in reached]:
        level = formatting.gain(measure, target)
        desc += (
            f" Reached {level}, the baseline's final {measures.written(measure)}, and stayed "
            f"there: {'; '.join(whens)}."
        )
    title = f"{measures.title(measure)} over the energy of own training"
    return figures.save(figure, "energy-to-gain", title, desc + rest, desc + rest)


def _mean(curves: list[Curve]) -> Curve:
    """Return the mean of curves read as often, log by log; of others the first."""
    if len({len(curve) for curve in curves}) > 1:
        return curves[0]
    return [
        (math.fsum(j for j, _ in at) / len(at), math.fsum(y for _, y in at) / len(at))
        for at in zip(*curves, strict=True)
    ]


def _when(e: ToTarget) -> str:
    if not e.n:
        return "never"
    seeds = f" ({e.not_reached} of {e.n + e.not_reached} seeds did not)" if e.not_reached else ""
    return f"after {formatting.si(e.mean, 'J')}{seeds}"
