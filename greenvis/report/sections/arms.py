"""Tables with one row per arm: what was gained and what it cost; compute, size and speed; tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import floor, tables, task_columns, verdict
from greenvis.report.blocks import ArmTable, Badge, Block, Inline, Strong, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results

BOLD = (
    "Bold: the interval, which holds for all arms together with 95 %, leaves out no change. ± "
    "standard deviation over seeds; a–b: band of the estimate; ×: ratio to the baseline, with its "
    "interval. “Keeps”: {margin} lost. "
)
BADGES = {
    "measured": "read from a live counter or computed exactly",
    "estimated": "observed activity × a published coefficient",
    "constant": "an assumed value comes in",
    "partly unknown": "a device or some time was not seen, so more was used",
}
ASSUMED = " no place was given: the grams use the world's average."
COUNTED = (
    "1 MAC = 2 FLOPs. Latency, throughput and memory are measured on the machine below; MACs, "
    "FLOPs and parameters are counted."
)


@dataclass(frozen=True)
class Tables:
    """The tables; those without a value are None."""

    costs: ArmTable
    further: ArmTable | None
    sizes: ArmTable | None
    tasks: ArmTable | None
    left_out: int  # arms
    noise_floor: str
    margin: str
    assumed_grid: bool


class Arms(Section[Tables]):
    """All arms side by side."""

    name = "arms"
    title = "Arms"

    def compute(self, results: Results) -> Tables:
        """Return the columns in which some arm has a value."""
        gained = "What was gained, and what it cost"
        one_by_one = "Tasks, one after another"
        return Tables(
            tables.table(results, tables.costs(results), "costs", gained),
            tables.some(results, tables.further(results), "further", "Further metrics and tests"),
            tables.some(results, tables.sizes(results), "sizes", "Compute, size and speed"),
            tables.some(results, task_columns.columns(results), "tasks", one_by_one),
            max(0, len(results.order) - tables.MOST_ROWS),
            floor.sentence(results),
            verdict.margin(results),
            results.assumed_grid,
        )

    def render(self, value: Tables) -> Sequence[Block]:
        """Return each table with its legend."""
        blocks: list[Block] = [value.costs]
        if value.left_out:
            more = f"{value.left_out} more arms are in results.csv and results.json."
            blocks.append(paragraph(Strong(more), look="note"))
        blocks += [paragraph(value.noise_floor, look="note"), _legend(value)]
        blocks += [value.further] if value.further else []
        if value.sizes:
            blocks += [value.sizes, paragraph(COUNTED, look="note")]
        return [*blocks, *([value.tasks] if value.tasks else [])]


def _legend(value: Tables) -> Block:
    text: list[Inline] = [
        BOLD.format(margin=f"at most {value.margin} are" if value.margin else "nothing is")
    ]
    for i, (badge, meaning) in enumerate(BADGES.items()):
        text += [Badge(badge), f" {meaning}" + ("; " if i < len(BADGES) - 1 else ".")]
    if value.assumed_grid:
        text += [" ", Badge("assumed grid"), ASSUMED]
    return paragraph(*text, look="note")
