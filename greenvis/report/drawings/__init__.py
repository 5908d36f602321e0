"""What the figures of a report draw, each from results alone. A figure without data is left out,
not drawn empty."""

from __future__ import annotations

from greenvis.report import figures
from greenvis.report.drawings import family, gain, payback, size, tasks
from greenvis.report.figures import Drawing
from greenvis.report.shape import Results


def first(results: Results) -> Drawing | None:
    """Return the figure of the first screen: the metric against energy."""
    with figures.theme():
        return gain.gain_vs_energy(results)


def draw(results: Results) -> list[Drawing]:
    """Return the other figures these results allow."""
    with figures.theme():
        drawn = [
            payback.payback(results),
            gain.energy_to_gain(results),
            tasks.curve(results),
            tasks.growth(results),
            size.by_phase(results),
            size.size_and_speed(results),
            family.tree(results),
            *(
                tasks.task_matrix(results, a, i)
                for i, a in enumerate(results.order[: figures.MOST_ARMS])
            ),
        ]
    return [d for d in drawn if d is not None]
