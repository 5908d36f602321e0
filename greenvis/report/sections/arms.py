"""All arms side by side, a line each."""

from __future__ import annotations

from collections.abc import Sequence

from greenvis.report import brief_table, tables
from greenvis.report.blocks import ArmTable, Block, Strong, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results


class Arms(Section[tuple[ArmTable, int]]):
    """The table of arms."""

    name = "arms"
    title = "Arms"

    def compute(self, results: Results) -> tuple[ArmTable, int]:
        """Return the table, and how many arms it leaves out."""
        return brief_table.table(results), max(0, len(results.order) - tables.MOST_ROWS)

    def render(self, value: tuple[ArmTable, int]) -> Sequence[Block]:
        """Return the table."""
        table, left_out = value
        if not left_out:
            return [table]
        more = f"{left_out} more arms are in results.csv and results.json."
        return [table, paragraph(Strong(more), look="note")]
