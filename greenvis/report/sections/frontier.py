"""The frontier: what each arm saves against the best of plain training at the same metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from greenvis.report import formatting, frontier, label_curve, measures
from greenvis.report.blocks import Block, Bullets, Grid, paragraph
from greenvis.report.formatting import si
from greenvis.report.frontier import Distance
from greenvis.report.section import Section
from greenvis.report.shape import Results

HOW = (
    "What would plain training have needed for the same {name}? The frontier is the front of the "
    "arms without a technique (other lengths of training, networks, image sizes) and with as many "
    "labels; ×0.5 is half of its energy. It is read between its points, on the logarithm of the "
    "energy, and never beyond them; intervals are over seeds, each read off its own plain arms."
)


@dataclass(frozen=True)
class Said:
    """The table, what it comes to, and the metric."""

    table: Grid
    bullets: tuple[str, ...]
    name: str


class Frontier(Section[Said]):
    """Distances to the frontier of plain training."""

    name = "frontier"
    title = "Against the frontier of plain training"

    def compute(self, results: Results) -> Said | None:
        """Return a row per arm with a technique, where two plain arms or more are beside it."""
        by_cost = [frontier.of_all(results, cost) for cost in frontier.COSTS]
        shown = list(by_cost[0])
        if not shown:
            return None
        distances = {a: [each[a] for each in by_cost] for a in shown}
        nothing = {frontier.FEW, frontier.UNMEASURED}
        if all(d.why in nothing for each in distances.values() for d in each):
            return None
        costs = (cost.format(unit=results.unit) for cost in frontier.COSTS)
        head = ("Arm", measures.title(results.measure), *costs, "Read")
        cells = tuple(_row(results, a, distances[a]) for a in shown)
        table = Grid(head, cells, "Energy beside that of plain training at the same metric")
        bullets = (*_ladders(results), *_unread(results, distances))
        return Said(table, bullets, measures.written(results.measure))

    def render(self, value: Said) -> Sequence[Block]:
        """Return the table, and below it the plain arms and what could not be read."""
        return [paragraph(HOW.format(name=value.name)), value.table, Bullets(value.bullets)]


def _row(results: Results, label: str, each: list[Distance]) -> tuple[str, ...]:
    row = results.arms[label]
    cells = (frontier.cell(d) for d in each)
    return (label, formatting.spread(results.measure, row.gain), *cells, frontier.finding(each[0]))


def _ladders(results: Results) -> list[str]:
    """Say which plain arms are the frontier, for each number of labels that they have."""
    plain = frontier.plain_arms(results)
    by_labels: dict[float | None, list[str]] = {}
    for arm, row in plain.items():
        by_labels.setdefault(label_curve.used(row), []).append(arm)
    said = []
    for labels, arms in by_labels.items():
        front = ", ".join(
            f"{a} ({formatting.gain(results.measure, plain[a].gain.mean)} for "
            f"{si(plain[a].train_energy_with_reuse_j.value, 'J')})"
            for a in frontier.on_front(results, {a: plain[a] for a in arms})
        )
        which = f", of {labels:,.0f} labels" if labels and len(by_labels) > 1 else ""
        said.append(f"On the frontier{which}: {front}.")
    spent = sum(row.spent.energy_j.value or 0.0 for row in plain.values())
    return [*said, f"All {len(plain)} plain arms took {si(spent, 'J')}."]


def _unread(results: Results, distances: dict[str, list[Distance]]) -> list[str]:
    """Say of the arms that are better than all plain ones what they gain and cost beside the
    best."""
    sign = -1.0 if results.lower_is_better else 1.0
    out = []
    for arm, (first, *_) in distances.items():
        row = results.arms[arm]
        plain = frontier.plain_arms(results, row)
        best = max(plain, key=lambda a: sign * (plain[a].gain.mean or 0.0), default=None)
        if first.why != "better than all plain arms" or best is None:
            continue
        energy = plain[best].train_energy_with_reuse_j.value
        own = row.train_energy_with_reuse_j.value
        if not energy or own is None:
            continue
        gained = (row.gain.mean or 0.0) - (plain[best].gain.mean or 0.0)
        out.append(
            f"{arm} is better than every plain arm: {formatting.points(results.measure, gained)} "
            f"beside {best}, at ×{formatting.figures(own / energy)} of its energy."
        )
    return out
