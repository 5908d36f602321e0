"""Every arm in detail: a sentence each; all that was gained and what it cost; compute, size and
speed; tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import tables, task_columns, verdict
from greenvis.report.blocks import ArmTable, Badge, Block, Bullets, Inline, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results

BOLD = (
    "Bold: “no change” lies outside the interval, which holds for all arms with 95 %. ± "
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
    """A sentence per arm, and the tables; those without a value are None."""

    sentences: tuple[str, ...]
    costs: ArmTable
    further: ArmTable | None
    sizes: ArmTable | None
    tasks: ArmTable | None
    margin: str
    assumed_grid: bool


class Details(Section[Tables]):
    """All that is known of each arm."""

    name = "details"
    title = "Every arm in detail"
    folded = True

    def compute(self, results: Results) -> Tables:
        """Return the columns in which some arm has a value."""
        gained = "What was gained, and what it cost"
        one_by_one = "Tasks, one after another"
        return Tables(
            tuple(_sentences(results)),
            tables.table(results, tables.costs(results), "costs", gained),
            tables.some(results, tables.further(results), "further", "Further metrics and tests"),
            tables.some(results, tables.sizes(results), "sizes", "Compute, size and speed"),
            tables.some(results, task_columns.columns(results), "tasks", one_by_one),
            verdict.margin(results),
            results.assumed_grid,
        )

    def render(self, value: Tables) -> Sequence[Block]:
        """Return each table with its legend."""
        blocks: list[Block] = [Bullets(value.sentences, look="others"), value.costs, _legend(value)]
        blocks += [value.further] if value.further else []
        if value.sizes:
            blocks += [value.sizes, paragraph(COUNTED, look="note")]
        return [*blocks, *([value.tasks] if value.tasks else [])]


def _sentences(results: Results) -> list[str]:
    rest = [a for a in results.order if a != results.baseline] or results.order
    said = [verdict.sentence(results, a) for a in rest[: tables.MOST_ROWS]]
    more = len(rest) - tables.MOST_ROWS
    return [*said, f"… and {more} more arms, in results.csv."] if more > 0 else said


def _legend(value: Tables) -> Block:
    text: list[Inline] = [
        BOLD.format(margin=f"at most {value.margin} are" if value.margin else "nothing is")
    ]
    for i, (badge, meaning) in enumerate(BADGES.items()):
        text += [Badge(badge), f" {meaning}" + ("; " if i < len(BADGES) - 1 else ".")]
    if value.assumed_grid:
        text += [" ", Badge("assumed grid"), ASSUMED]
    return paragraph(*text, look="note")
