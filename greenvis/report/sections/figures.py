"""What the figures draw."""

from __future__ import annotations

from collections.abc import Sequence

from greenvis.report import drawings, measures
from greenvis.report.blocks import Block, Drawings, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results


class Figures(Section[tuple[Drawings, str]]):
    """The figures that the results allow, beside the one of the first screen."""

    name = "figures"
    title = "Figures"

    def compute(self, results: Results) -> tuple[Drawings, str]:
        """Return the drawings, and what to say where there are none."""
        name = measures.written(results.measure)
        nothing = f"There is nothing to draw: no finished run has both energy and {name}."
        return Drawings(tuple(drawings.draw(results))), nothing

    def render(self, value: tuple[Drawings, str]) -> Sequence[Block]:
        """Return the drawings."""
        figures, nothing = value
        return [figures] if figures.items else [paragraph(nothing)]
