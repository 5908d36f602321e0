"""A report section from outside: all a third party has to write."""

from collections.abc import Sequence

from greenvis.report.blocks import Block, Grid, paragraph
from greenvis.report.formatting import si
from greenvis.report.section import Section
from greenvis.report.shape import Results


class Waste(Section[list[tuple[str, str]]]):
    """What of each arm's energy led to no result."""

    name = "waste"
    title = "What led to no result"

    def compute(self, results: Results) -> list[tuple[str, str]] | None:
        """Return the joules of starts that did not finish, by arm."""
        lost = {a: row.spent.unfinished_energy_j.value for a, row in results.rows.items()}
        return [(a, si(joules, "J")) for a, joules in lost.items() if joules is not None] or None

    def render(self, value: list[tuple[str, str]]) -> Sequence[Block]:
        """Return a table."""
        table = Grid(("Arm", "Lost"), tuple(value), self.title)
        return [paragraph("Energy of starts that did not finish."), table]
