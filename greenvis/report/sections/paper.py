"""What reviewers ask first, in one box, and a paragraph on methods to paste."""

from __future__ import annotations

from collections.abc import Sequence

from greenvis.report import paper
from greenvis.report.blocks import Block, Code, Grid
from greenvis.report.section import Section
from greenvis.report.shape import Results


class Paper(Section[tuple[Grid, str]]):
    """For a paper and its reviewers."""

    name = "paper"
    title = "For a paper"

    def compute(self, results: Results) -> tuple[Grid, str]:
        """Return the answers and the paragraph."""
        head = ("What reviewers ask first", "Answer")
        return Grid(head, tuple(paper.reviewers(results)), head[0]), paper.methods(results)

    def render(self, value: tuple[Grid, str]) -> Sequence[Block]:
        """Return the box, and the paragraph below it."""
        box, methods = value
        return [box, Code(methods, "Methods, to paste", wrap=True)]
