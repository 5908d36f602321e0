"""The metric against energy: of the whole line, and over the training."""

from __future__ import annotations

from typing import Any

from greenvis.report import figures, formatting, frontier, measures, stats, verdict
from greenvis.report.drawings._looks import axis, looks, most, scale
from greenvis.report.estimates import ToTarget
from greenvis.report.figures import Drawing, short
from greenvis.report.shape import Results


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
    k, (front, kind) = scale(results), _frontier(results, points)
    figure, [ax] = figures.canvas()
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
            label=kind,
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
    for a in named:
        (x, y), look = points[a], {**styles[a], "linestyle": "none", "ms": 8}
        std_x, std_y = arms[a].train_energy_with_reuse_j.std, arms[a].gain.std
        ax.plot(x, y * k, label=short(a), zorder=3, **look)
        error: Any = {"xerr": std_x or None, "yerr": std_y * k if std_y else None}
        ax.errorbar(x, y * k, fmt="none", ecolor=look["color"], capsize=3, elinewidth=1.2, **error)
    reused = any(row.uses for row in arms.values())
    energy = "energy, base and teacher included" if reused else "training energy"
    ax.set_xlabel(f"{energy} (less is better)")
    ax.set_ylabel(axis(results))
    ax.margins(0.14)
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.legend_below(figure, ax)
    what = "; ".join(
        f"{short(a, 40)} {formatting.gain(measure, points[a][1])} for "
        f"{formatting.si(points[a][0], 'J')}"
        for a in named
    )
    caption = _front(results, front, kind, named) + rest
    title = f"{measures.title(measure)} against {energy}"
    return figures.save(figure, "gain-vs-energy", title, f"{what}. {caption}", caption)


def _frontier(results: Results, points: dict[str, tuple[float, float]]) -> tuple[list[str], str]:
    """Return the arms that the line joins, and what it is: the frontier of plain training where
    there are several such arms."""
    sign = -1 if results.lower_is_better else 1
    plain = {a: row for a, row in frontier.plain_arms(results).items() if a in points}
    if frontier.LEAST <= len(plain) < len(points):
        return frontier.on_front(results, plain), "frontier of plain training"
    return stats.pareto({a: (x, sign * y) for a, (x, y) in points.items()}), "front of the means"


def _front(results: Results, front: list[str], kind: str, named: list[str]) -> str:
    best = ", ".join(short(a, 40) for a in front[:12])
    spread = any(results.arms[a].gain.std for a in named)
    bars = (
        "Bars: standard deviation over seeds." if spread else "One seed each: no spread is known."
    )
    lacking = verdict.not_counted(*results.arms.values())
    return f"On the {kind}, whose scatter may well change it: {best}. {bars}{lacking}"


def energy_to_gain(results: Results) -> Drawing | None:
    """The metric over the energy spent so far: one line a seed."""
    measure, curves = results.measure, {a: results.arms[a].curve for a in results.order}
    drawable = [a for a in results.order if any(len(c) > 1 for c in curves[a].values())]
    if not drawable:
        return None
    labels, rest = most(drawable)
    k = scale(results)
    figure, [ax] = figures.canvas()
    styles = looks(results)
    for a in labels:
        lines = [c for _, c in sorted(curves[a].items()) if len(c) > 1]
        for i, line in enumerate(lines):
            look = {**styles[a], "ms": 4, "alpha": 1.0 if i == 0 else 0.55}
            ax.plot(
                [j for j, _ in line],
                [y * k for _, y in line],
                label=short(a) if i == 0 else None,
                **look,
            )
    reached = {a: e for a in drawable if (e := results.arms[a].energy_to_baseline_j)}
    target = next((e.target for e in reached.values()), None)
    if target is not None:
        ax.axhline(
            target * k,
            color=figures.MUTED,
            lw=1,
            ls=":",
            label=f"final {short(str(results.baseline), 14)}",
        )
    ax.set_xlabel("energy of own training so far")
    ax.set_ylabel(axis(results))
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.legend_below(figure, ax)
    desc = "One line per seed, own training only."
    if whens := [f"{short(a, 40)} {_when(reached[a])}" for a in labels if a in reached]:
        level = formatting.gain(measure, target)
        desc += (
            f" Reached {level}, the baseline's final {measures.written(measure)}, and stayed "
            f"there: {'; '.join(whens)}."
        )
    title = f"{measures.title(measure)} over the energy of own training"
    return figures.save(figure, "energy-to-gain", title, desc + rest, desc + rest)


def _when(e: ToTarget) -> str:
    if not e.n:
        return "never"
    seeds = f" ({e.not_reached} of {e.n + e.not_reached} seeds did not)" if e.not_reached else ""
    return f"after {formatting.si(e.mean, 'J')}{seeds}"
