"""What the figures of a report draw, each from results alone. A figure without data is left out,
not drawn empty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from greenvis.report import continual, family, figures, formatting, stats, verdict
from greenvis.report.figures import Drawing, short

Results = dict[str, Any]


def draw(results: Results) -> list[Drawing]:
    """Return the figures these results allow."""
    with figures.theme():
        styles = _styles(results)
        drawn = [
            gain_vs_energy(results),
            energy_to_gain(results),
            by_phase(results),
            size_and_speed(results),
            payback(results),
            family.tree(results),
            continual.curve(results, styles),
            continual.growth(results, styles),
            *(
                task_matrix(results, a, i)
                for i, a in enumerate(results["order"][: figures.MOST_ARMS])
            ),
        ]
    return [d for d in drawn if d is not None]


def _styles(results: Results) -> dict[str, dict[str, Any]]:
    """Each arm's looks, the same in all figures; the grey is the baseline's alone."""
    offset = 0 if results["baseline"] in results["order"] else 1
    return {a: figures.style(i + offset) for i, a in enumerate(results["order"])}


def _most(labels: list[str]) -> tuple[list[str], str]:
    """The arms a figure can hold, and what to say of the rest."""
    rest = len(labels) - figures.MOST_ARMS
    return labels[
        : figures.MOST_ARMS
    ], f" The first {figures.MOST_ARMS} of {len(labels)} arms." if rest > 0 else ""


def gain_vs_energy(results: Results) -> Drawing | None:
    """The metric against the energy of the whole line, with spread over seeds and the front of the
    means."""
    metric, arms = results["metric"], results["arms"]
    line = {a: arms[a]["train_energy_with_reuse_j"] for a in results["order"]}
    points = {
        a: (line[a]["value"], arms[a][metric]["mean"])
        for a in results["order"]
        if line[a]["value"] is not None and arms[a][metric]["mean"] is not None
    }
    if not points:
        return None
    sign, k = (-1 if results["lower_is_better"] else 1), (100 if formatting.share(metric) else 1)
    front = stats.pareto({a: (x, sign * y) for a, (x, y) in points.items()})
    figure, [ax] = figures.canvas()
    looks = _styles(results)
    named, rest = _most(list(points))
    if len(front) > 1:
        ax.plot(
            [points[a][0] for a in front],
            [points[a][1] * k for a in front],
            color=figures.MUTED,
            lw=1.2,
            ls="--",
            zorder=1,
            label="front of the means",
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
        (x, y), look = points[a], {**looks[a], "linestyle": "none", "ms": 8}
        std_x, std_y = line[a]["std"], arms[a][metric]["std"]
        ax.plot(x, y * k, label=short(a), zorder=3, **look)
        error: Any = {"xerr": std_x or None, "yerr": std_y * k if std_y else None}
        ax.errorbar(x, y * k, fmt="none", ecolor=look["color"], capsize=3, elinewidth=1.2, **error)
    reused = any(row["uses"] for row in arms.values())
    energy = "energy, base and teacher included" if reused else "training energy"
    ax.set_xlabel(f"{energy} (less is better)")
    ax.set_ylabel(_axis(results))
    ax.margins(0.14)
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.legend_below(figure, ax)
    what = "; ".join(
        f"{short(a, 40)} {formatting.gain(metric, points[a][1])} for "
        f"{formatting.si(points[a][0], 'J')}"
        for a in named
    )
    best = ", ".join(short(a, 40) for a in front[:12])
    spread = any(arms[a][metric]["std"] for a in named)
    bars = (
        "Bars: standard deviation over seeds." if spread else "One seed each: no spread is known."
    )
    lacking = verdict.not_counted(*arms.values())
    caption = (
        f"On the front of the means, whose scatter may well change it: {best}. "
        f"{bars}{lacking}{rest}"
    )
    return figures.save(
        figure,
        "gain-vs-energy",
        f"{metric.capitalize()} against {energy}",
        f"{what}. {caption}",
        caption,
    )


def _axis(results: Results) -> str:
    unit = " (%)" if formatting.share(results["metric"]) else ""
    return f"{short(results['metric'])}{unit}"


def energy_to_gain(results: Results) -> Drawing | None:
    """The metric over the energy spent so far: one line a seed."""
    metric, curves = results["metric"], {a: results["arms"][a]["curve"] for a in results["order"]}
    drawable = [a for a in results["order"] if any(len(c) > 1 for c in curves[a].values())]
    if not drawable:
        return None
    labels, rest = _most(drawable)
    k = 100 if formatting.share(metric) else 1
    figure, [ax] = figures.canvas()
    looks = _styles(results)
    for a in labels:
        lines = [c for _, c in sorted(curves[a].items()) if len(c) > 1]
        for i, line in enumerate(lines):
            look = {**looks[a], "ms": 4, "alpha": 1.0 if i == 0 else 0.55}
            ax.plot(
                [j for j, _ in line],
                [y * k for _, y in line],
                label=short(a) if i == 0 else None,
                **look,
            )
    target = next(
        (
            results["arms"][a]["energy_to_baseline_j"]["target"]
            for a in drawable
            if results["arms"][a].get("energy_to_baseline_j")
        ),
        None,
    )
    if target is not None:
        ax.axhline(
            target * k,
            color=figures.MUTED,
            lw=1,
            ls=":",
            label=f"final {short(str(results['baseline']), 14)}",
        )
    ax.set_xlabel("energy of own training so far")
    ax.set_ylabel(_axis(results))
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.legend_below(figure, ax)
    reached = []
    for a in labels:
        e = results["arms"][a].get("energy_to_baseline_j")
        if e:
            missed = (
                f" ({e['not_reached']} of {e['n'] + e['not_reached']} seeds did not)"
                if e["not_reached"]
                else ""
            )
            when = f"after {formatting.si(e['mean'], 'J')}{missed}" if e["n"] else "never"
            reached.append(f"{short(a, 40)} {when}")
    level = formatting.gain(metric, target)
    desc = "One line per seed, own training only."
    if reached:
        desc += (
            f" Reached {level}, the baseline's final {metric}, and stayed there: "
            f"{'; '.join(reached)}."
        )
    return figures.save(
        figure,
        "energy-to-gain",
        f"{metric.capitalize()} over the energy of own training",
        desc + rest,
        desc + rest,
    )


def by_phase(results: Results) -> Drawing | None:
    """Energy by stage, stacked: mean over seeds."""
    arms = results["arms"]
    shown, rest = _most([a for a in results["order"] if arms[a]["energy_by_phase_j"]])
    if not shown:
        return None
    known = list(figures.STAGES)
    stages = sorted(
        {s for a in shown for s in arms[a]["energy_by_phase_j"]},
        key=lambda s: (known.index(s) if s in known else 99, s),
    )
    figure, [ax] = figures.canvas(height=max(2.2, 1.5 + 0.36 * len(shown)))
    left = dict.fromkeys(shown, 0.0)
    for i, s in enumerate(stages):
        values = [arms[a]["energy_by_phase_j"].get(s, 0.0) for a in shown]
        colour = figures.SERIES[figures.STAGES.get(s, 4 + i % 4)][0]
        ax.barh([short(a, 18) for a in shown], values, left=[left[a] for a in shown], color=colour,
                edgecolor=figures.GROUND, lw=0.8, label=short(s, 14))  # fmt: skip
        left = {a: left[a] + v for a, v in zip(shown, values, strict=True)}
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("energy, mean over seeds")
    figures.unit_axis(ax.xaxis, "J")
    ax.locator_params(axis="x", nbins=5)
    figures.legend_below(figure, ax, 3)
    parts = "; ".join(
        f"{short(a, 40)} "
        + ", ".join(
            f"{short(s)} {formatting.si(arms[a]['energy_by_phase_j'][s], 'J')}"
            for s in stages
            if s in arms[a]["energy_by_phase_j"]
        )
        for a in shown
    )
    caption = f"Mean over seeds, own training and measurement; “other” is time in no phase.{rest}"
    return figures.save(
        figure, "energy-by-phase", "Energy by phase", f"{parts}. {caption}", caption
    )


def size_and_speed(results: Results) -> Drawing | None:
    """Small bars side by side: compute, size and latency of each arm."""
    panels: list[tuple[str, str, Callable[[dict[str, Any]], float | None]]] = [
        ("MACs per image", "", lambda r: r["macs"]),
        ("training FLOPs", "", lambda r: r["train_flops"]),
        ("trained parameters", "", lambda r: r["trainable_params"]),
        (
            "latency p50",
            "s",
            lambda r: (
                None
                if not r["latency_ms"] or r["latency_ms"].get("p50") is None
                else r["latency_ms"]["p50"] / 1e3
            ),
        ),
    ]
    arms = results["arms"]
    panels = [p for p in panels if any(p[2](arms[a]) is not None for a in results["order"])]
    labels, rest = _most(
        [a for a in results["order"] if any(p[2](arms[a]) is not None for p in panels)]
    )
    if not panels or not labels:
        return None
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, axes = figures.canvas(5.2, rows * max(1.2, 0.7 + 0.26 * len(labels)), columns, rows)
    looks = _styles(results)
    for i, (ax, (title, unit, value)) in enumerate(zip(axes, panels, strict=False)):
        values = [value(arms[a]) or 0.0 for a in labels]
        std = [arms[a]["std"]["latency_p50_ms"] or 0.0 for a in labels] if unit else []
        bars: dict[str, Any] = (
            {"xerr": [s / 1e3 for s in std], "ecolor": figures.INK, "capsize": 2}
            if any(std)
            else {}
        )
        ax.barh(range(len(labels)), values, color=[looks[a]["color"] for a in labels], **bars)
        for y, a in enumerate(labels):
            ax.text(
                values[y] + (std[y] / 1e3 if std else 0.0),
                y,
                " " + formatting.si(value(arms[a]), unit),
                va="center",
                fontsize=9,
            )
        ax.set_yticks(
            range(len(labels)),
            [short(a, 14) for a in labels] if i % columns == 0 else [""] * len(labels),
        )
        ax.set_title(title, fontsize=10, loc="left", color=figures.INK)
        ax.set_xlim(0, (max(values) + max(std, default=0.0) / 1e3 or 1) * 1.75)
        ax.set_xticks([])
        ax.grid(visible=False)
        ax.invert_yaxis()
        ax.spines["bottom"].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    desc = "; ".join(
        f"{short(a, 40)}: " + ", ".join(f"{t} {formatting.si(f(arms[a]), u)}" for t, u, f in panels)
        for a in labels
    )
    return figures.save(
        figure,
        "size-and-speed",
        "Compute, size and latency",
        f"{desc}.",
        f"Less is better in all. Latency: median, bar ± standard deviation over seeds.{rest}",
    )


def payback(results: Results) -> Drawing | None:
    """Energy to make and use each arm, as a share of the baseline's, against the images served,
    with the crossing points."""
    arms, base = results["arms"], results["baseline"]
    measured = [
        a
        for a in results["order"]
        if arms[a]["inference_energy_j"]["value"] and arms[a]["train_energy_j"]["value"] is not None
    ]
    rivals = [
        a
        for a in measured
        if a != base and arms[a]["vs_baseline"] and arms[a]["vs_baseline"]["payback"]
    ]
    if base not in measured or not rivals:
        return None
    labels, rest = _most(rivals)
    points = {a: arms[a]["vs_baseline"]["payback"] for a in labels}
    crossings = [
        p[k]["images"]
        for p in points.values()
        for k in p
        if p[k]["images"] and p[k]["images"] < 1e12
    ]
    far = max([results["served"], *(4 * n for n in crossings)])
    xs = [10 ** (2 + i * (math.log10(max(far, 1e3)) - 2) / 60) for i in range(61)]
    import numpy as np
    from matplotlib.ticker import LogLocator, NullLocator

    figure, [ax] = figures.canvas(height=4.0)
    looks = _styles(results)
    ax.axhline(
        1.0,
        color=figures.MUTED,
        lw=1.8,
        label=short(str(base)) + (" (baseline)" if base != "baseline" else ""),
    )
    for a in labels:
        look = {k: v for k, v in looks[a].items() if k != "marker"}
        low, mean, high = _shares(arms[a], arms[base], xs)
        unsure = points[a]["own"]["verdict"] == "not shown"
        ax.plot(xs, mean, label=short(a), **look, lw=0.9 if unsure else 1.8)
        ax.fill_between(xs, low, high, color=look["color"], alpha=0.14, lw=0)
        if arms[a]["base_reuse"] != arms[base]["base_reuse"]:
            with_reuse = _shares(arms[a], arms[base], xs, reuse=True)[1]
            ax.plot(
                xs,
                with_reuse,
                label=f"{short(a, 12)}, including the base",
                **{**look, "linestyle": ":"},
            )
        n = points[a]["own"]["images"]
        if n and xs[0] <= n <= far:
            ax.plot(
                n,
                1.0,
                marker=looks[a]["marker"],
                ms=9,
                color=look["color"],
                mec=figures.INK,
                ls="none",
            )
    ax.set_xscale("log")
    ax.set_xlabel("images served")
    ax.set_ylabel(f"make and use, × {short(str(base), 14)}")
    figures.unit_axis(ax.xaxis, "")
    ax.xaxis.set_minor_locator(NullLocator())
    ends = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.get_lines()])
    if max(ends) > 4 * min(ends):  # on a straight axis one dear arm would flatten the others
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        figures.unit_axis(ax.yaxis, "")
    else:
        ax.set_ylim(bottom=0)
    figures.legend_below(figure, ax)
    paybacks = " ".join(
        formatting.payback(points[a]["own"], short(a, 40), short(str(base), 40)) for a in labels
    )
    how = (
        "Below 1: ahead of the baseline. Bands: lowest to highest seed, own training. Thin: the "
        "energy of one image shows no "
    )
    how += f"difference. Dotted: base and teacher included.{verdict.not_counted(*arms.values())}"
    return figures.save(
        figure,
        "payback",
        "Payback: energy to make and use, against images served",
        f"{paybacks} {how}{rest}",
        f"{paybacks} {how}{rest}",
    )


def _shares(
    arm: dict[str, Any], base: dict[str, Any], xs: list[float], reuse: bool = False
) -> tuple[list[float], list[float], list[float]]:
    """Return the lowest seed, the mean and the highest seed of (make + use an arm) ÷ (make + use
    the baseline)."""

    def cost(row: dict[str, Any], seed: str | None, x: float) -> float:
        make, use = (row[k] for k in ("train_energy_j", "inference_energy_j"))
        reused = (
            (row["base_reuse"]["whole_j"]["value"] or 0.0) if reuse and row["base_reuse"] else 0.0
        )
        return reused + (
            make["value"] + use["value"] * x
            if seed is None
            else make["by_seed"][seed] + use["by_seed"][seed] * x
        )

    known = [
        set(r[k]["by_seed"]) for r in (arm, base) for k in ("train_energy_j", "inference_energy_j")
    ]
    seeds = sorted(set.intersection(*known))
    mean = [cost(arm, None, x) / cost(base, None, x) for x in xs]
    each = (
        [[cost(arm, s, x) / cost(base, s, x) for s in seeds] for x in xs]
        if len(seeds) > 1
        else [[m] for m in mean]
    )
    return [min(e) for e in each], mean, [max(e) for e in each]


def task_matrix(results: Results, label: str, i: int) -> Drawing | None:
    """Accuracy on each task after learning each task, for continual learning."""
    matrix = results["arms"][label].get("task_accuracy")
    if not matrix:
        return None
    from matplotlib import colormaps

    n = len(matrix)
    figure, [ax] = figures.canvas(height=min(5.2, 1.6 + 0.5 * n))
    colours = colormaps["viridis"]
    for t in range(n):
        for k in range(n):
            v = matrix[t][k]
            if v is None:
                continue
            r, g, b, _ = colours(min(1.0, max(0.0, v)))
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
                    f"{v * 100:.0f}",
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
    last = ", ".join(formatting.gain("accuracy", v) for v in matrix[-1])
    desc = (
        f"{short(label, 60)}: accuracy in per cent on each task (column) after each task was "
        f"learned (row). At the end: {last}."
    )
    return figures.save(
        figure,
        f"tasks-{i}",
        f"Accuracy by task: {short(label, 40)}",
        desc,
        "Per cent, mean over seeds.",
    )
