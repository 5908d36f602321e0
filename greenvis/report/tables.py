"""The tables of a report, once for HTML, Markdown and CSV: what columns say, what is shown, how it
is known."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import formatting, measures, stats
from greenvis.report.arm_results import ArmResults
from greenvis.report.arms import STEP
from greenvis.report.blocks import ArmRow, ArmTable, Cell
from greenvis.report.columns import Column
from greenvis.report.estimates import Estimate, FurtherMetric, Ratio
from greenvis.report.formatting import MISSING, plural, si
from greenvis.report.shape import Results
from greenvis.tasks.base import Measure

MOST_ROWS = 100  # rows a page shows; results.csv has them all


def costs(results: Results) -> list[Column]:
    """Return the columns of the first table: what was gained and what it cost, with all it builds
    on first."""
    measure = results.measure
    head = measures.title(measure)
    reused = any(row.uses for row in results.arms.values())
    line = [
        _reading(
            "train_energy_with_reuse_j",
            "Energy, base and teacher included",
            "J",
            lacks=lambda r: r.unknown,
        ),
        _ratio("train_energy_with_reuse", "Energy ÷ baseline, base and teacher included"),
    ]
    own = "Own training energy" if reused else "Training energy"
    return [
        Column(
            measure.name,
            head,
            lambda r: r.gain.mean,
            lambda r: formatting.spread(measure, r.gain),
            _seeds,
            lambda r: "measured" if r.gain.n else None,
        ),
        Column(
            "vs_metric",
            f"{head} vs baseline",
            _difference,
            lambda r: formatting.points(measure, _difference(r)),
            lambda r: _decided(r, measure),
            shown=lambda r: formatting.shown(r.difference),
        ),
        *(line if reused else ()),
        _reading("train_energy_j", own, "J"),
        _ratio("train_energy", f"{own} ÷ baseline"),
        _reading(
            "carbon_g",
            "Carbon of own training (CO₂e)" if reused else "Carbon (CO₂e)",
            "g",
            lambda r: "assumed grid" if r.assumed_grid else r.carbon_g.provenance,
        ),
        Column(
            "reuse_j",
            "Builds on",
            lambda r: r.base_reuse.whole_j.value if r.base_reuse else None,
            _builds_on,
            _reused,
            lambda r: r.base_reuse.whole_j.provenance if r.base_reuse else None,
        ),
        Column("wall_s", "Time", lambda r: r.wall_s, lambda r: formatting.duration(r.wall_s)),
    ]


def further(results: Results) -> list[Column]:
    """Return a column for each other metric of the task, and for the metric on further tests."""
    rows = results.arms.values()
    return [
        _further(*key) for key in dict.fromkeys((f.metric, f.test) for r in rows for f in r.further)
    ]


def _further(metric: str, test: str) -> Column:
    def of(row: ArmResults) -> FurtherMetric | None:
        return next((f for f in row.further if (f.metric, f.test) == (metric, test)), None)

    def mean(row: ArmResults) -> float | None:
        entry = of(row)
        return None if entry is None else entry.mean

    def text(row: ArmResults) -> str:
        if (entry := of(row)) is None:
            return MISSING
        return formatting.spread(Measure(metric, entry.unit, entry.higher_is_better), entry)

    head = measures.title(Measure(metric))
    return Column(
        "_".join(("further", metric, *([test] if test else []))),
        f"{head} on {test}" if test else head,
        mean,
        text,
    )


def sizes(results: Results) -> list[Column]:
    """Return the columns of the second table: compute, size and speed."""
    many = plural(results.unit)
    seeds = (r.by_seed for r in results.arms.values())
    steps = dict.fromkeys(key for by in seeds for key in by if key.startswith(STEP))
    return [
        _plain("params", "Parameters"),
        _plain("trainable_params", "Trained parameters"),
        _plain("delta_bytes", "Size of what was learned", "B"),
        _plain("macs", f"MACs per {results.unit}"),
        _plain("train_flops", "Training FLOPs"),
        Column(
            "latency_p50_ms",
            "Latency p50",
            lambda r: (r.latency_ms or {}).get("p50"),
            lambda r: si(r.latency_s("p50"), "s"),
            lambda r: f"p95 {si(p95, 's')}" if (p95 := r.latency_s("p95")) is not None else "",
        ),
        Column(
            "images_per_s",
            f"{_capital(many)}/s",
            lambda r: r.images_per_s,
            lambda r: si(r.images_per_s),
        ),
        Column(
            "peak_memory_mb",
            "Peak memory",
            lambda r: r.peak_memory_mb,
            lambda r: si(None if r.peak_memory_mb is None else r.peak_memory_mb * 1e6, "B"),
        ),
        *(column for key in steps for column in _step(key)),
    ]


def cycle(results: Results) -> list[Column]:
    """Return the columns of the full-cycle table."""
    one, many = f"One {results.unit}", plural(results.unit)
    return [
        _cycle("make_j", "Training"),
        Column(
            "reuse_whole_j",
            "Builds on, charged whole",
            lambda r: r.full_cycle.reuse_whole_j if r.full_cycle else None,
            _builds_on,
            _reused,
        ),
        _cycle("reuse_shared_j", "Builds on, shared", _users),
        _reading("inference_energy_j", one, "J"),
        _ratio("inference_energy", f"{one} ÷ baseline"),
        Column(
            "wh_per_1000_images",
            f"Wh per 1,000 {many}",
            lambda r: r.full_cycle.wh_per_1000_images if r.full_cycle else None,
            lambda r: _small(r.full_cycle.wh_per_1000_images if r.full_cycle else None),
        ),
        Column(
            "sci_g",
            f"SCI (CO₂e per {results.unit})",
            lambda r: r.sci.g_per_image,
            lambda r: si(r.sci.g_per_image, "g"),
        ),
        _cycle("total_whole_j", "All, charged whole"),
        _cycle("total_shared_j", "All, shared"),
    ]


def table(results: Results, columns: list[Column], name: str, caption: str) -> ArmTable:
    """Return the table of the first `MOST_ROWS` arms, with the columns that are `used`."""
    columns = used(results, columns)
    rows = [(a, results.arms[a]) for a in results.order[:MOST_ROWS]]
    return ArmTable(
        f"t-{name}",
        caption,
        tuple(c.title for c in columns),
        tuple(
            ArmRow(a, row.status, a == results.baseline, _techniques(row), cells(row, columns))
            for a, row in rows
        ),
    )


def some(results: Results, columns: list[Column], name: str, caption: str) -> ArmTable | None:
    """Return a table, None where no column has a value."""
    out = table(results, columns, name, caption)
    return out if out.titles else None


def cells(row: ArmResults, columns: list[Column]) -> tuple[Cell, ...]:
    """Return an arm's cells."""
    return tuple(Cell(c.text(row), c.sub(row), c.badge(row), c.shown(row)) for c in columns)


def used(results: Results, columns: list[Column]) -> list[Column]:
    """Return the columns in which at least one arm has a value, or something to say of what it
    builds on."""
    rows = results.arms.values()
    return [
        c
        for c in columns
        if any(c.number(r) is not None or (c.text is _builds_on and r.uses) for r in rows)
    ]


def _reading(
    key: str,
    title: str,
    unit: str,
    badge: Callable[[ArmResults], str | None] | None = None,
    lacks: Callable[[ArmResults], list[str]] = lambda row: [],
) -> Column:
    """Return the column of a reading, with its band below. lacks: the names of what is not in
    it."""

    def of(row: ArmResults) -> Estimate:
        return getattr(row, key)

    return Column(
        key,
        title,
        lambda r: of(r).value,
        lambda r: formatting.reading(of(r), unit) + (" + not known" if lacks(r) else ""),
        lambda r: _band(of(r), unit),
        badge or (lambda r: of(r).provenance),
    )


def _ratio(key: str, title: str) -> Column:
    """Return the column of an energy's ratio to the baseline, with its interval below."""
    return Column(
        f"vs_{key}",
        title,
        lambda r: x.ratio if (x := r.ratio(key)) and x.low is not None else None,
        lambda r: formatting.factor(r.ratio(key)),
        lambda r: _interval(r.ratio(key)) if r.vs_baseline else "",
        shown=lambda r: formatting.shown(r.ratio(key)),
    )


def _plain(key: str, title: str, unit: str = "") -> Column:
    def value(row: ArmResults) -> float | None:
        return getattr(row, key)

    return Column(key, title, value, lambda r: si(value(r), unit))


def _step(key: str) -> tuple[Column, Column]:
    """Return the columns of what a technique did once: CPU seconds, and their ratio to the
    baseline's."""

    def mean(row: ArmResults) -> float | None:
        return stats.summary(row.by_seed.get(key, {})).mean

    title = f"CPU time of {key.removeprefix(STEP)}"
    own = Column(key, title, mean, lambda r: si(mean(r), "s"))
    return own, _ratio(key, f"{title} ÷ baseline")


def _cycle(key: str, title: str, sub: Callable[[ArmResults], str] = lambda row: "") -> Column:
    def value(row: ArmResults) -> float | None:
        return getattr(row.full_cycle, key, None)

    return Column(key, title, value, lambda r: si(value(r), "J"), sub)


def _band(reading: Estimate, unit: str) -> str:
    """Return the band of a reading: "1.98–4.01 kJ"."""
    if None in (reading.value, reading.low) or reading.low == reading.high:
        return ""
    low, high = si(reading.low, unit, 2), si(reading.high, unit, 2)
    same = low.split(" ")[-1] == high.split(" ")[-1]
    return f"{low.rsplit(' ', 1)[0] if same else low}–{high}"


def _seeds(row: ArmResults) -> str:
    n = len(row.seeds)
    if not n:
        return "not finished"
    return ("1 seed" if n == 1 else f"{n} seeds") + (
        ", not all finished" if row.status == "partly done" else ""
    )


def _techniques(row: ArmResults) -> str:
    return ", ".join(row.technique_names)


def _interval(r: Ratio | None) -> str:
    """Return the interval of a ratio and whether it tells a difference: "×0.87–1.12, no difference
    shown"."""
    if not r or not r.n:
        return "no value to compare"
    if r.low is None:
        return "one seed: no interval"
    return formatting.factor_band(r) + ("" if formatting.shown(r) else ", no difference shown")


def _decided(row: ArmResults, measure: Measure) -> str:
    """Return the interval of the metric and what it decides: "−1.48 to +2.07: keeps"."""
    if not row.vs_baseline:
        return ""
    d = row.difference
    return ": ".join(
        x for x in (formatting.interval(measure, d) if d else "", formatting.decided(d)) if x
    )


def _builds_on(row: ArmResults) -> str:
    """Return what a row builds on in joules; what nobody knows is "not known", never 0."""
    if not row.uses:
        return "nothing"
    joules = row.base_reuse.whole_j.value if row.base_reuse else None
    known = "" if joules is None else si(joules, "J")
    return " + ".join(x for x in (known, "not known" if row.unknown else "") if x)


def _reused(row: ArmResults) -> str:
    """Return what a row builds on: "base, 116 mg CO₂e; not counted: the weights of others"."""
    grams = _grams(row.base_reuse.whole_g.value if row.base_reuse else None)
    parts = ", ".join(x for x in (*dict.fromkeys(u.role for u in row.uses), grams) if x)
    return parts + (f"; not counted: {', '.join(names)}" if (names := row.unknown) else "")


def _grams(value: float | None) -> str:
    return "" if value is None else f"{si(value, 'g')} CO₂e"


def _users(row: ArmResults) -> str:
    n = sorted({u.used_by_runs for u in row.uses})
    if not n:
        return ""
    grams = _grams(row.base_reuse.shared_g if row.base_reuse else None)
    return ", ".join(x for x in (f"among {' or '.join(map(str, n))} runs", grams) if x)


def _difference(row: ArmResults) -> float | None:
    """Return the difference of the metric; of one seed there is no interval, and no comparison."""
    d = row.difference
    return d.mean if d and d.low is not None else None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small(value: float | None) -> str:
    return MISSING if value is None else formatting.figures(value, 2)
