"""Models that segment images: what they answer, beside images and masks."""

from __future__ import annotations

from collections.abc import Sequence

from greenvis.report.blocks import Block, Drawings
from greenvis.report.drawings import drawn
from greenvis.report.figures import theme
from greenvis.report.section import Section
from greenvis.report.shape import Results


class Segments(Section[Drawings]):
    """The segments of a few images of the test."""

    name = "segments"
    title = "Segments"

    def compute(self, results: Results) -> Drawings | None:
        """Return images, masks and answers."""
        with theme():
            figure = drawn.segments(results)
        return Drawings((figure,)) if figure else None

    def render(self, value: Drawings) -> Sequence[Block]:
        """Return the figure."""
        return [value]
