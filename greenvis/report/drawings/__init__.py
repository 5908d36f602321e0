"""What the figures of a report draw, each from results alone. A figure without data is left out,
not drawn empty."""

from __future__ import annotations

from greenvis.report import figures
from greenvis.report.drawings import family, gain, payback, size, tasks
from greenvis.report.figures import Drawing
from greenvis.report.shape import Results


def draw(results: Results) -> list[Drawing]:
    """Return the figures these results allow."""
    with figures.theme():
        drawn = [
            gain.gain_vs_energy(results),
            gain.energy_to_gain(results),
            size.by_phase(results),
            size.size_and_speed(results),
            payback.payback(results),
            family.tree(results),
            tasks.curve(results),
            tasks.growth(results),
            *(
                tasks.task_matrix(results, a, i)
                for i, a in enumerate(results.order[: figures.MOST_ARMS])
            ),
        ]
    return [d for d in drawn if d is not None]
