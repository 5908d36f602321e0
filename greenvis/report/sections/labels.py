"""Labels and images: what each arm used, what a person gave for it, and what labels are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from greenvis.report import formatting, label_curve, measures, stats, tables
from greenvis.report.arm_results import ArmResults
from greenvis.report.blocks import Block, Bullets, Grid, paragraph
from greenvis.report.formatting import MISSING, si
from greenvis.report.label_curve import Worth
from greenvis.report.section import Section
from greenvis.report.shape import Results

HOW = (
    "Labels count whatever they were spent on: training, thresholds, choosing a model. Hours are "
    "counts times the seconds below, central (low–high); they are never turned into joules."
)
WORTH = (
    "Labels alone: the labels with which arms without a technique (the best on each number of "
    "labels, or on fewer) reach the same {name}, interpolated between measured points of that "
    "curve on the logarithm of the labels, never beyond them. Exchange rate: joules more than such "
    "an arm, per label spared. Intervals are over seeds, each read off its own curve, the rate’s "
    "by Fieller’s theorem; “or more”: that it spares no label is not excluded. Joules are with all "
    "an arm builds on."
)


MOST_COLUMNS = 12  # of rounds
ROUNDS = (
    "Labels bought in rounds, of images that a query chose: the metric after each. The choices and "
    "all trainings are in the arm's energy; the last column is the last round alone."
)


@dataclass(frozen=True)
class Said:
    """The tables, what could not be read off, where the seconds come from, and the metric."""

    table: Grid
    rounds: Grid | None
    bullets: tuple[str, ...]
    seconds: tuple[str, ...]
    name: str


class Labels(Section[Said]):
    """Labels, images, hours, and the exchange rate."""

    name = "labels"
    title = "Labels and images"

    def compute(self, results: Results) -> Said | None:
        """Return the table, where arms differ in what they used, or hours were asked for."""
        rows = {a: row for a, row in results.rows.items() if row.labels}
        if not rows or not _matters(results):
            return None
        shown = list(rows)[: tables.MOST_ROWS]
        plain = label_curve.label_only(results)
        worths = {a: label_curve.worth(results, a) for a in shown if a not in plain}
        name = measures.written(results.measure)
        per = "point" if measures.is_share(results.measure) else name
        head = (
            "Arm", "Labels", "Images", "Hours of labelling", measures.title(results.measure),
            f"J per {per} above labels alone", "Labels alone, same metric", "Exchange rate",
        )  # fmt: skip
        cells = tuple(_row(results, a, worths.get(a)) for a in shown)
        return Said(
            Grid(head, cells, self.title),
            _rounds(results),
            (*_target(results, plain), *_unread(worths), *_nearness(rows)),
            tuple(
                f"{kind}: {s.central:g} s a label ({s.low:g}–{s.high:g}). {s.source}"
                for kind, s in results.label_seconds.items()
            ),
            name,
        )

    def render(self, value: Said) -> Sequence[Block]:
        """Return the table, and below it what it rests on."""
        blocks: list[Block] = [paragraph(HOW), value.table]
        if value.rounds is not None:
            blocks += [paragraph(ROUNDS), value.rounds]
        if value.bullets:
            blocks.append(Bullets(value.bullets))
        blocks.append(paragraph(WORTH.format(name=value.name), look="note"))
        return [*blocks, Bullets(value.seconds, look="others")] if value.seconds else blocks


def _matters(results: Results) -> bool:
    rows = [row for row in results.arms.values() if row.labels]
    alike = {tuple((p.kind, p.why, p.count) for p in row.labels) for row in rows}
    roles = any(n for row in rows for role, n in row.images.items() if role != "labelled")
    asked = any(s.asked for s in results.label_seconds.values())
    return len(alike) > 1 or roles or asked


def _nearness(rows: Mapping[str, ArmResults]) -> list[str]:
    """Return how near the made images of each arm come to real ones."""
    said = []
    for label, row in rows.items():
        near, apart, copies = map(row.nearness.get, ("nearest_real", "real_apart", "copies"))
        if near is not None:
            beside = "" if apart is None else f" (real ones: {apart:.3f} from each other)"
            same = "" if copies is None else f"; {copies:,.0f} of them copy a real one"
            said.append(
                f"{label}: a made image lies {near:.3f} from the nearest real one of its class"
                f"{beside}, medians over images of root mean squares of pixels from 0 to 1{same}."
            )
    return said


def _row(results: Results, label: str, worth: Worth | None) -> tuple[str, ...]:
    row = results.arms[label]
    hours = label_curve.hours(row, results)
    time = MISSING
    if hours is not None:
        low, central, high = (formatting.duration(3600 * hours[b]) for b in hours)
        time = central if low == high else f"{central} ({low} – {high})"
    return (
        label,
        _counts(row),
        ", ".join(f"{n or 0:,.0f} {role}" for role, n in row.images.items()) or MISSING,
        time,
        formatting.spread(results.measure, row.gain),
        si(worth.per_point_j, "J") if worth else MISSING,
        _same(worth) if worth else MISSING,
        _rate(worth) if worth else MISSING,
    )


def _rounds(results: Results) -> Grid | None:
    """Return the metric after each round of labels bought, a column per number of labels."""
    rows = {a: r for a, r in results.rows.items() if r.label_rounds}
    columns = sorted({one.labels for r in rows.values() for one in r.label_rounds})
    if len(columns) < 2 or len(columns) > MOST_COLUMNS:
        return None
    cells = []
    for arm, row in list(rows.items())[: tables.MOST_ROWS]:
        by_labels = {one.labels: one for one in row.label_rounds}
        shown = [
            formatting.spread(results.measure, by_labels[n].gain) if n in by_labels else MISSING
            for n in columns
        ]
        last = stats.summary(row.label_rounds[-1].energy_j).mean
        cells.append((arm, row.query, *shown, si(last, "J")))
    head = ("Arm", "Query", *(f"{n:,.0f} labels" for n in columns), "Joules of the last round")
    return Grid(head, tuple(cells), "Labels bought in rounds")


def _same(worth: Worth) -> str:
    text = formatting.count(worth.same)
    if worth.same_interval is None:
        return text
    low, high = map(formatting.count, worth.same_interval)
    return f"{text} ({low} – {high})"


def _rate(worth: Worth) -> str:
    if worth.rate_j is None:
        return MISSING if worth.same is None else "none spared"
    text = f"{si(worth.rate_j, 'J')} per label"
    if worth.low is None:
        return f"{text} (any rate may be true)" if worth.same_interval else text
    low = si(worth.low, "J")
    return (
        f"{text} ({low} or more)"
        if worth.high is None
        else (f"{text} ({low} – {si(worth.high, 'J')})")
    )


def _counts(row: ArmResults) -> str:
    """Return "50: 40 class, 10 class for threshold"."""
    total = label_curve.used(row)
    parts = [
        f"{p.count or 0:,.0f} {p.kind}" + ("" if p.why == "training" else f" ({p.why})")
        for p in row.labels
    ]
    return parts[0] if len(parts) == 1 else f"{total or 0:,.0f}: {', '.join(parts)}"


def _target(results: Results, plain: dict[str, ArmResults]) -> list[str]:
    """Say with how few labels any arm reached the baseline's metric."""
    base = results.arms.get(results.baseline or "")
    if base is None or base.gain.mean is None:
        return []
    sign, target = (-1.0 if results.lower_is_better else 1.0), base.gain.mean
    reached = [
        (n, a)
        for a, row in results.rows.items()
        if (n := label_curve.used(row)) is not None
        and row.gain.mean is not None
        and sign * row.gain.mean >= sign * target
    ]
    if not reached:
        return []
    n, arm = min(reached, key=lambda pair: pair[0])
    level = formatting.gain(results.measure, target)
    alone = sorted(n for n, a in reached if a in plain)
    more = f"; on labels alone, {alone[0]:,.0f} of those measured" if alone else ""
    return [
        f"Fewest labels with which a mean reached {level}, the baseline's: {n:,.0f} ({arm}){more}."
    ]


def _unread(worths: Mapping[str, Worth]) -> list[str]:
    """Say of which arms no exchange rate or no interval was read off, and why."""
    why: dict[str, list[str]] = {}
    for arm, worth in worths.items():
        if worth.why:
            why.setdefault(f"Exchange rate not read off: {{}}: {worth.why}.", []).append(arm)
        if worth.why_open:
            why.setdefault(f"Interval not read off: {{}}: {worth.why_open}.", []).append(arm)
    return [text.format(", ".join(arms)) for text, arms in why.items()]
