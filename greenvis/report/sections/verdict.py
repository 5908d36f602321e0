"""What was saved, what it cost with all it builds on, and how sure that is: the first screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import formatting, lead
from greenvis.report.blocks import Badge, Block, Facts, Inline, Lead, Strong, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results


@dataclass(frozen=True)
class Said:
    """The first screen, the recipe's note, and what all runs took."""

    lead: Lead
    note: str | None
    spent: tuple[tuple[Inline, ...], ...]


class Verdict(Section[Said]):
    """The first section."""

    name = "verdict"
    title = "Verdict"

    def compute(self, results: Results) -> Said:
        """Return the sentence with its figures, and all that was spent."""
        return Said(lead.lead(results), results.note, tuple(_spent(results)))

    def render(self, value: Said) -> Sequence[Block]:
        """Return the first screen, and below it the note and the totals."""
        note = [paragraph(f"From the recipe’s author: {value.note}")] if value.note else []
        return [value.lead, *note, Facts(value.spent)]


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
