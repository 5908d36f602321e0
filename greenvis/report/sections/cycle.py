"""Making a model once and using it on many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import formatting, tables, verdict
from greenvis.report.blocks import ArmTable, Block, Bullets, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results


@dataclass(frozen=True)
class Cycle:
    """The table, None where no run finished, and paybacks in words."""

    served: str
    table: ArmTable | None
    paybacks: list[str]


class FullCycle(Section[Cycle]):
    """What arms cost over their life."""

    name = "cycle"
    title = "Full cycle"
    folded = True

    def compute(self, results: Results) -> Cycle:
        """Return costs at the usage of the report, and from how many images on arms are ahead."""
        table = tables.some(results, tables.cycle(results), "cycle", "Make and use")
        served = f"{results.served:,.0f} {formatting.plural(results.unit)}"
        return Cycle(served, table, _paybacks(results))

    def render(self, value: Cycle) -> Sequence[Block]:
        """Return the table and the paybacks."""
        what = (
            f"Making the model once and using it on {value.served}, with what an arm "
            "builds on (a teacher, a base trained in another run) charged whole, and shared among "
            "the runs here that use it."
        )
        table = value.table or paragraph("Nothing is known of it: no run finished.")
        paybacks = [Bullets(tuple(value.paybacks))] if value.paybacks else []
        return [paragraph(what), table, *paybacks]


def _paybacks(results: Results) -> list[str]:
    out = []
    for a in results.order[: tables.MOST_ROWS]:
        versus = results.arms[a].vs_baseline
        if not versus:
            continue
        p, base = versus.payback, str(results.baseline)
        text = formatting.payback(p.own if p else None, a, base, results.unit)
        if p and p.own.verdict != "not shown" and (charged := verdict.builds_on(results, a)):
            with_reuse = formatting.payback(p.with_reuse, a, base, results.unit)
            more = " changes nothing in this." if with_reuse == text else f": {with_reuse}"
            text += f" Including {charged}{more}"
        out.append(text)
    return out
