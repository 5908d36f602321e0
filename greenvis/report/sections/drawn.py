"""Models that draw images: settings, their energy and distance, whether classes went missing, and
images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from greenvis.report import formatting, measures
from greenvis.report.blocks import Block, Drawings, Grid, paragraph
from greenvis.report.drawings import drawn
from greenvis.report.figures import theme
from greenvis.report.formatting import MISSING, si
from greenvis.report.section import Section
from greenvis.report.shape import Results

COLLAPSED = 0.5  # bits of class entropy fewer than the most varied setting's
HEAD = ("Arm", "Setting", "Network calls", "{metric}", "Energy", "÷ first", "Class entropy")


class Shown(NamedTuple):
    """What the section shows."""

    finding: str
    table: Grid
    drawings: Drawings


class Drawn(Section[Shown]):
    """The settings of models that draw images."""

    name = "drawn"
    title = "Images drawn"

    def compute(self, results: Results) -> Shown | None:
        """Return settings by which images are drawn."""
        settings = [
            (arm, s)
            for arm, row in results.rows.items()
            for s in row.operating_points
            if s.calls is not None
        ]
        with theme():
            figures = [f for f in (drawn.distance_vs_energy(results), drawn.grid(results)) if f]
        if not settings and not figures:
            return None
        known = {
            f"{a} at {s.setting}": e for a, s in settings if (e := s.class_entropy) is not None
        }
        gone = [s for s, e in known.items() if e < max(known.values()) - COLLAPSED]
        finding = (
            f"Classes go missing: {', '.join(gone)} draws less varied images than the others "
            f"(class entropy more than {COLLAPSED:g} bit lower): a low distance says little there."
            if gone
            else "No setting draws fewer classes than the others."
            if known
            else ""
        )
        head = tuple(text.format(metric=measures.title(results.measure)) for text in HEAD)
        rows = tuple(
            (
                arm,
                s.setting,
                f"{s.calls:.3g}",
                formatting.spread(results.measure, s.accuracy),
                si(s.inference_energy_j, "J"),
                MISSING if s.energy_ratio is None else f"{s.energy_ratio:.3f}",
                MISSING if s.class_entropy is None else f"{s.class_entropy:.2f} bit",
            )
            for arm, s in settings
        )
        return Shown(finding, Grid(head, rows, self.title), Drawings(tuple(figures)))

    def render(self, value: Shown) -> Sequence[Block]:
        """Return the finding, the table and the figures."""
        out: list[Block] = [paragraph(value.finding)] if value.finding else []
        out += [value.table] if value.table.rows else []
        return [*out, value.drawings] if value.drawings.items else out
