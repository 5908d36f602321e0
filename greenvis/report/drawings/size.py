"""Energy by phase; compute, size and speed side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenvis.report import figures, formatting
from greenvis.report.arm_results import ArmResults
from greenvis.report.figures import Drawing, short
from greenvis.report.looks import looks, most
from greenvis.report.shape import Results

# title, unit, value
PANELS: tuple[tuple[str, str, Callable[[ArmResults], float | None]], ...] = (
    ("MACs per answer", "", lambda r: r.macs),
    ("training FLOPs", "", lambda r: r.train_flops),
    ("trained parameters", "", lambda r: r.trainable_params),
    ("latency p50", "s", lambda r: r.latency_s("p50")),
)


def by_phase(results: Results) -> Drawing | None:
    """Energy by stage, stacked: mean over seeds."""
    arms = results.arms
    shown, rest = most([a for a in results.order if arms[a].energy_by_phase_j])
    if not shown:
        return None
    stages = sorted(
        {s for a in shown for s in arms[a].energy_by_phase_j},
        key=lambda s: (figures.STAGES.index(s) if s in figures.STAGES else 99, s),
    )
    figure, [ax] = figures.canvas(height=max(2.2, 1.5 + 0.36 * len(shown)))
    left = dict.fromkeys(shown, 0.0)
    for i, s in enumerate(stages):
        values = [arms[a].energy_by_phase_j.get(s, 0.0) for a in shown]
        known = figures.STAGES.index(s) if s in figures.STAGES else len(figures.STAGES) + i
        colour = figures.PHASES[known % len(figures.PHASES)][0]
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
            f"{short(s)} {formatting.si(arms[a].energy_by_phase_j[s], 'J')}"
            for s in stages
            if s in arms[a].energy_by_phase_j
        )
        for a in shown
    )
    caption = (
        "Mean over seeds. “measure” is what measuring took, and in no training energy; the others "
        f"add up to own training. “other” is time in no phase.{rest}"
    )
    return figures.save(
        figure, "energy-by-phase", "Energy by phase", f"{parts}. {caption}", caption
    )


def size_and_speed(results: Results) -> Drawing | None:
    """Small bars side by side: compute, size and latency of each arm."""
    arms = results.arms
    panels = [p for p in PANELS if any(p[2](arms[a]) is not None for a in results.order)]
    labels, rest = most(
        [a for a in results.order if any(p[2](arms[a]) is not None for p in panels)]
    )
    if not panels or not labels:
        return None
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure, axes = figures.canvas(5.2, rows * max(1.2, 0.7 + 0.26 * len(labels)), columns, rows)
    styles = looks(results)
    for i, (ax, (title, unit, value)) in enumerate(zip(axes, panels, strict=False)):
        values = [value(arms[a]) or 0.0 for a in labels]
        std = [arms[a].std["latency_p50_ms"] or 0.0 for a in labels] if unit else []
        bars: dict[str, Any] = (
            {"xerr": [s / 1e3 for s in std], "ecolor": figures.INK, "capsize": 2}
            if any(std)
            else {}
        )
        ax.barh(range(len(labels)), values, color=[styles[a]["color"] for a in labels], **bars)
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
