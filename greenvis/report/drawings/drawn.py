"""Models that draw images: what each setting reaches and costs, and what it draws; and segments
that models answer."""

from __future__ import annotations

import re

from greenvis.report import figures, formatting, measures, pictures
from greenvis.report.arm_results import Picture, Setting
from greenvis.report.figures import Drawing, short
from greenvis.report.looks import axis, scale
from greenvis.report.shape import Results
from greenvis.tasks.segmentation import PICTURES

MOST_ROWS = 16
CACHED = re.compile(r", (every \d+|change \S+)$")  # of the name of a setting


def distance_vs_energy(results: Results) -> Drawing | None:
    """The metric of each setting against its joules per image: one line per way of saving."""
    lines = {name: points for name, points in ways(results).items() if len(points) > 0}
    if sum(map(len, lines.values())) < 2:
        return None
    k, measure = scale(results), results.measure
    figure, [ax] = figures.canvas(height=4.4)
    for i, (name, points) in enumerate([*lines.items()][: figures.MOST_ARMS]):
        ordered = sorted(points, key=lambda s: s.inference_energy_j or 0.0)
        xs = [s.inference_energy_j or 0.0 for s in ordered]
        ys = [(s.accuracy.mean or 0.0) * k for s in ordered]
        ax.plot(xs, ys, label=short(name), **{**figures.style(i), "ms": 6})
        errors = [(s.accuracy.std or 0.0) * k for s in ordered]
        ax.errorbar(xs, ys, yerr=errors, fmt="none", ecolor=figures.style(i)["color"], capsize=2)
    ax.set_xscale("log")
    if not measure.higher_is_better:
        ax.set_yscale("log")
    ax.set_xlabel(f"energy per {results.unit} (less is better)")
    ax.set_ylabel(axis(results))
    figures.unit_axis(ax.xaxis, "J")
    figures.legend_below(figure, ax)
    name = measures.written(measure)
    texts = [
        f"{short(way, 40)}: "
        + ", ".join(
            f"{short(s.setting, 40)} {formatting.gain(measure, s.accuracy.mean)} at "
            f"{formatting.si(s.inference_energy_j, 'J')}"
            for s in points
        )
        for way, points in lines.items()
    ]
    desc = f"{name} of each setting against its energy per {results.unit}. " + "; ".join(texts)
    return figures.save(
        figure,
        "drawn-vs-energy",
        f"{measures.title(measure)} against energy per {results.unit}",
        desc + ".",
        "Mean over seeds, bar ± standard deviation. One line per solver, and per cache.",
    )


def ways(results: Results) -> dict[str, list[Setting]]:
    """Return settings of which both figures are known, by arm and by what makes them cheaper: the
    solver, or a cache."""
    out: dict[str, list[Setting]] = {}
    for arm, row in results.rows.items():
        for s in row.operating_points:
            if s.calls is None or s.inference_energy_j is None or s.accuracy.mean is None:
                continue
            own = CACHED.sub("", s.setting)
            name = f"{own}, cached" if own != s.setting else own.partition(" ")[0]
            out.setdefault(f"{arm}: {name}", []).append(s)
    return out


def grid(results: Results) -> Drawing | None:
    """Images that each setting draws, a row each."""
    rows = [
        (f"{short(arm)}: {short(p.setting, 30)}", p)
        for arm, row in results.rows.items()
        for p in row.drawn
        if p.setting not in PICTURES
    ]
    desc = "Images drawn for the same classes: "
    return _strips(rows, "drawn", "Images drawn", desc, "One row per setting, first seed.")


def segments(results: Results) -> Drawing | None:
    """Images of the test, their masks, and the segments that each arm answers, a row each."""
    images, masks, answers = PICTURES
    rows: list[tuple[str, Picture]] = []
    for arm, row in results.rows.items():
        known = {p.setting: p for p in row.drawn if p.setting in PICTURES}
        if len(known) == len(PICTURES):
            rows += [] if rows else [(images, known[images]), (masks, known[masks])]
            rows.append((short(arm), known[answers]))
    desc = "Images of the test and their segments: "
    note = "One row per arm, first seed. Colours are classes, black the background."
    return _strips(rows, "segments", "Segments", desc, note)


def _strips(
    rows: list[tuple[str, Picture]], name: str, title: str, desc: str, note: str
) -> Drawing | None:
    import numpy as np

    rows = [(label, p) for label, p in rows if pictures.pixels(p)][:MOST_ROWS]
    if not rows:
        return None
    figure, axes = figures.canvas(width=7.0, height=0.4 + 0.55 * len(rows), rows=len(rows))
    for ax, (label, picture) in zip(axes, rows, strict=True):
        count, channels, height, width = picture.shape
        values = np.frombuffer(pictures.pixels(picture), np.uint8)
        shown = values.reshape(count, channels, height, width).transpose(2, 0, 3, 1)
        shown = shown.reshape(height, count * width, channels)
        if channels not in (1, 3):
            shown = shown[..., :1]
        ax.imshow(np.repeat(shown, 3, 2) if shown.shape[2] == 1 else shown, interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(visible=False)
    desc += "; ".join(label for label, _ in rows) + "."
    return figures.save(figure, name, title, desc, note)
