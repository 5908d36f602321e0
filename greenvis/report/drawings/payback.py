"""Energy to make and use each arm, against the images served."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from greenvis.report import figures, formatting, verdict
from greenvis.report.arm_results import ArmResults
from greenvis.report.figures import Drawing, Label, short
from greenvis.report.looks import few, looks
from greenvis.report.shape import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOW = (
    "Below 1: ahead of the baseline. Bands: lowest to highest seed, own training. Thin: the energy "
    "of one {unit} shows no difference. Dotted: base and teacher included."
)


def payback(results: Results) -> Drawing | None:
    """Energy to make and use each arm, as a share of the baseline's, against the images served,
    with the crossing points."""
    arms, base = results.arms, results.baseline
    measured = [
        a
        for a, row in results.rows.items()
        if row.inference_energy_j.value and row.train_energy_j.value is not None
    ]
    paybacks = {
        a: versus.payback
        for a in measured
        if a != base and (versus := arms[a].vs_baseline) and versus.payback
    }
    if base is None or base not in measured or not paybacks:
        return None
    labels, rest = few(results, list(paybacks))
    points = {a: paybacks[a] for a in labels}
    images = [n for p in points.values() for n in (p.own.images, p.with_reuse.images)]
    crossings = [n for n in images if n and n < 1e12]
    far = max([results.served, *(4 * n for n in crossings)])
    xs = [10 ** (2 + i * (math.log10(max(far, 1e3)) - 2) / 60) for i in range(61)]
    figure, [ax] = figures.canvas(height=4.0)
    styles, names = looks(results), [Label(short(base, 16), figures.MUTED, xs[-1], 1.0)]
    ax.axhline(1.0, color=figures.MUTED, lw=1.8)
    breaks = []
    for a in labels:
        look = {k: v for k, v in styles[a].items() if k != "marker"}
        low, mean, high = _shares(arms[a], arms[base], xs)
        unsure = points[a].own.verdict == "not shown"
        gid = f"arm{results.order.index(a)}"
        ax.plot(xs, mean, gid=gid, **look, lw=0.9 if unsure else 1.8)
        ax.fill_between(xs, low, high, color=look["color"], alpha=0.14, lw=0)
        names.append(Label(short(a, 16), look["color"], xs[-1], mean[-1]))
        if arms[a].base_reuse != arms[base].base_reuse:
            with_reuse = _shares(arms[a], arms[base], xs, reuse=True)[1]
            ax.plot(xs, with_reuse, **{**look, "linestyle": ":"})
        n = points[a].own.images
        if n and xs[0] <= n <= far:
            ax.plot(n, 1.0, marker=styles[a]["marker"], ms=9, color=look["color"],
                    mec=figures.INK, ls="none")  # fmt: skip
            many = f"{formatting.count(n)} {formatting.plural(results.unit)}"
            pays = points[a].own.verdict == "pays back"
            text = f"breaks even after {many}" if pays else f"ahead until {many}"
            breaks.append(Label(text, look["color"], n, 1.0))
    _axes(ax, base, formatting.plural(results.unit))
    figures.label_points(ax, breaks)
    figures.label_ends(ax, names)
    sentences = " ".join(
        formatting.payback(points[a].own, short(a, 40), short(base, 40), results.unit)
        for a in labels
    )
    how = HOW.format(unit=results.unit)
    text = f"{sentences} {how}{verdict.not_counted(*arms.values())}{rest}"
    title = f"Payback: energy to make and use, against {formatting.plural(results.unit)} served"
    return figures.save(figure, "payback", title, text, how + rest)


def _axes(ax: Axes, base: str, served: str) -> None:
    """Label both axes; one on which a dear arm would flatten the others is logarithmic."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    ax.set_xlabel(f"{served} served")
    ax.set_ylabel(f"make and use, × {short(base, 14)}")
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


def _shares(
    arm: ArmResults, base: ArmResults, xs: list[float], reuse: bool = False
) -> tuple[list[float], list[float], list[float]]:
    """Return the lowest seed, the mean and the highest seed of (make + use an arm) ÷ (make + use
    the baseline)."""

    def cost(row: ArmResults, seed: str | None, x: float) -> float:
        make, use = row.train_energy_j, row.inference_energy_j
        reused = (row.base_reuse.whole_j.value or 0.0) if reuse and row.base_reuse else 0.0
        if seed is None:
            return reused + (make.value or 0.0) + (use.value or 0.0) * x
        return reused + make.seeds[seed] + use.seeds[seed] * x

    known = [{*e.seeds} for r in (arm, base) for e in (r.train_energy_j, r.inference_energy_j)]
    seeds = sorted(set.intersection(*known))
    mean = [cost(arm, None, x) / cost(base, None, x) for x in xs]
    each = (
        [[cost(arm, s, x) / cost(base, s, x) for s in seeds] for x in xs]
        if len(seeds) > 1
        else [[m] for m in mean]
    )
    return [min(e) for e in each], mean, [max(e) for e in each]
