"""Models that can be switched after training: what each setting reaches and costs."""

from __future__ import annotations

from collections.abc import Sequence

from greenvis.report import formatting, measures
from greenvis.report.arm_results import Setting
from greenvis.report.blocks import Block, Grid, paragraph
from greenvis.report.formatting import MISSING, si
from greenvis.report.section import Section
from greenvis.report.shape import Results
from greenvis.tasks.base import Measure

HEAD = (
    "Arm",
    "Setting",
    "{metric}",
    "Energy of 1,000 {units}",
    "÷ never",
    "MACs per {unit}",
    "÷ never",
    "Realised ÷ theoretical",
    "Leaves at exit 1, 2, … end",
)
HOW = (
    "Switched after training, on test data in batches of 64; no setting was chosen on them. "
    "Settings take turns, a few batches each; joules are those of the median pass over them, "
    "“±” is the quartile range of the passes’ ratios ÷ √passes."
)
REBATCHED = (
    " Rebatched: behind an exit, images of several batches go on together, as a whole batch."
)


class Settings(Section[Grid]):
    """The settings of each arm that has some."""

    name = "settings"
    title = "Settings of one model"

    def compute(self, results: Results) -> Grid | None:
        """Return a row per setting."""
        arms, measure = results.rows.items(), results.measure
        rows = [_row(arm, s, measure) for arm, row in arms for s in row.operating_points]
        words = {"metric": measures.title(measure), "unit": results.unit}
        words["units"] = formatting.plural(results.unit)
        head = tuple(text.format(**words) for text in HEAD)
        return Grid(head, tuple(rows), self.title) if rows else None

    def render(self, value: Grid) -> Sequence[Block]:
        """Return how it was measured, and the table."""
        rebatched = REBATCHED if any("rebatched" in row[1] for row in value.rows) else ""
        return [paragraph(HOW + rebatched), value]


def _row(arm: str, s: Setting, measure: Measure) -> tuple[str, ...]:
    joules, ratio = s.inference_energy_j, s.energy_ratio
    give = f" ± {ratio * s.energy_spread:.2f}" if ratio is not None and s.energy_spread else ""
    return (
        arm,
        s.setting,
        formatting.spread(measure, s.accuracy),
        si(None if joules is None else joules * 1000, "J"),
        _times(ratio) + give,
        si(s.macs),
        _times(s.macs_ratio),
        _times(s.realised),
        " · ".join(f"{share:.0%}" for share in s.exits) or MISSING,
    )


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
