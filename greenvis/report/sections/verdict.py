"""What was gained, what it cost with all it builds on, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import formatting, verdict
from greenvis.report.blocks import Badge, Block, Bullets, Facts, Inline, Strong, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results

MOST_OTHERS = 20


@dataclass(frozen=True)
class Said:
    """The sentence on top, those on other arms, the recipe's note, and what all runs took."""

    opening: str
    others: list[str]
    note: str | None
    spent: tuple[tuple[Inline, ...], ...]


class Verdict(Section[Said]):
    """The first section."""

    name = "verdict"
    title = "Verdict"

    def compute(self, results: Results) -> Said:
        """Return the sentences, the arm that came nearest first."""
        top = verdict.headline(results)
        rest = [a for a in results.order if a not in (top, results.baseline)]
        others = [verdict.sentence(results, a) for a in rest[:MOST_OTHERS]]
        more = len(results.order) - MOST_OTHERS - 2
        if more > 0:
            others.append(f"… and {more} more arms, in the table.")
        return Said(verdict.opening(results), others, results.note, tuple(_spent(results)))

    def render(self, value: Said) -> Sequence[Block]:
        """Return the verdict in large letters, the others below."""
        blocks: list[Block] = [paragraph(value.opening, look="verdict")]
        if value.others:
            blocks.append(Bullets(tuple(value.others), look="others"))
        if value.note:
            blocks.append(paragraph(f"From the recipe’s author: {value.note}"))
        return [*blocks, Facts(value.spent)]


def _spent(results: Results) -> list[tuple[Inline, ...]]:
    totals = results.totals
    joules, grams = totals.energy_j, totals.carbon_g
    lamp = f" ({formatting.lamp(joules.value)})" if joules.value else ""
    out: list[tuple[Inline, ...]] = [
        ("All runs together: ", Strong(formatting.reading(joules, "J")), lamp)
    ]
    if grams.value is not None:
        assumed = (" ", Badge("assumed grid")) if results.assumed_grid else ()
        out.append((Strong(formatting.reading(grams, "g")), " CO₂e", *assumed))
    if lost := totals.unfinished_energy_j.value:
        out.append((Strong(formatting.si(lost, "J")), " on starts that did not finish"))
    return out
