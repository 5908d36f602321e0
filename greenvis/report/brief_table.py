"""The table of a report's arms: a line each, beside the baseline."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import floor, formatting, label_curve, measures, tables, verdict
from greenvis.report.arm_results import ArmResults
from greenvis.report.blocks import ArmRow, ArmTable, Cell
from greenvis.report.estimates import Estimate
from greenvis.report.formatting import MISSING, si
from greenvis.report.lead import MARKS
from greenvis.report.looks import series
from greenvis.report.shape import Results

Make = Callable[[str, ArmResults], Cell]


def table(results: Results) -> ArmTable:
    """Return a line per arm: the metric and what becomes of it, energies and latency beside the
    baseline's, labels and carbon. Columns without a figure are left out."""
    columns = {head: make for head, make in _columns(results) if _any(results, make)}
    arms = results.order[: tables.MOST_ROWS]
    return ArmTable(
        "t-arms",
        "A line per arm",
        tuple(columns),
        tuple(
            ArmRow(
                a,
                results.arms[a].status,
                a == results.baseline,
                "",
                tuple(make(a, results.arms[a]) for make in columns.values()),
                series(results, a),
                i,
            )
            for i, a in enumerate(arms)
        ),
        _note(results),
        brief=True,
    )


def _any(results: Results, make: Make) -> bool:
    cells = [make(a, results.arms[a]) for a in results.order[: tables.MOST_ROWS]]
    return any(cell.text not in ("", MISSING) for cell in cells)


def _columns(results: Results) -> list[tuple[str, Make]]:
    measure, base = results.measure, results.baseline
    reused = any(row.uses for row in results.arms.values())
    line = "Energy, base and teacher included" if reused else "Training energy"
    gains = formatting.points(measure, 0.0).partition(" ")[2]  # "points", or the metric's unit
    columns: list[tuple[str, Make]] = [
        (measures.title(measure), lambda a, r: _plain(r.gain.mean, _score(results, r))),
        (f"Δ {measures.written(measure)}" + (f", {gains}" if gains else ""), _change(results)),
    ]
    energies = [(line, "train_energy_with_reuse", "train_energy_with_reuse_j")]
    energies += [("Own training", "train_energy", "train_energy_j")] if reused else []
    energies += [(f"Per {results.unit}", "inference_energy", "inference_energy_j")]
    for head, quantity, key in energies:
        columns.append((head, _energy(quantity, key, base)))
    columns.append(("Latency", _latency(base)))
    counts = {label_curve.used(row) for row in results.arms.values()}
    if len(counts) > 1:
        columns.append(("Labels", lambda a, r: _plain(n := label_curve.used(r), _count(n))))
    columns.append(("CO₂e", lambda a, r: _plain(g := _grams(r), si(g, "g"))))
    return columns


def _plain(value: float | None, text: str, hint: str = "") -> Cell:
    return Cell(text, value=value, hint=hint)


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def _score(results: Results, row: ArmResults) -> str:
    if row.gain.mean is None:
        return MISSING if row.seeds else "not finished"
    return formatting.gain(results.measure, row.gain.mean)


def _change(results: Results) -> Make:
    """Return the column of the difference of the metric with its interval and what that decides."""
    measure = results.measure

    def cell(arm: str, row: ArmResults) -> Cell:
        d = row.difference
        if arm == results.baseline:
            return Cell("baseline", value=0.0)
        if d is None or d.low is None or d.high is None:
            return Cell("one seed" if len(row.seeds) == 1 and results.baseline else MISSING)
        half, unit = (d.high - d.low) / 2, measures.suffix(measure)
        mean = formatting.points(measure, d.mean, 1).removesuffix(" points").removesuffix(unit)
        wide = 100 * half if measures.is_share(measure) else half
        text = f"{mean} ± {formatting.figures(wide, 2)}"
        hint = formatting.decided(d, verdict.margin(results))
        return Cell(text, mark=MARKS[d.verdict], value=d.mean, hint=hint)

    return cell


def _energy(quantity: str, key: str, base: str | None) -> Make:
    """Return the column of an energy: the baseline's, and beside it how many times that of
    others."""

    def cell(arm: str, row: ArmResults) -> Cell:
        reading: Estimate = getattr(row, key)
        joules = formatting.reading(reading, "J")
        ratio = row.ratio(quantity)
        unknown = " + not known" if row.unknown and quantity == "train_energy_with_reuse" else ""
        if arm == base or ratio is None or ratio.low is None:
            return Cell(joules + (unknown if reading.value is not None else ""),
                        value=1.0 if arm == base else None)  # fmt: skip
        band = formatting.factor_band(ratio).removeprefix("×")
        text = f"{formatting.factor(ratio)} ({band}){unknown}"
        return Cell(text, shown=formatting.shown(ratio), value=ratio.ratio, hint=joules)

    return cell


def _latency(base: str | None) -> Make:
    def cell(arm: str, row: ArmResults) -> Cell:
        seconds, ratio = row.latency_s("p50"), row.ratio("latency_p50")
        if arm == base or ratio is None or ratio.low is None:
            return Cell(si(seconds, "s"), value=1.0 if arm == base else None)
        band = formatting.factor_band(ratio).removeprefix("×")
        text = f"{formatting.factor(ratio)} ({band})"
        shown = formatting.shown(ratio)
        return Cell(text, shown=shown, value=ratio.ratio, hint=si(seconds, "s"))

    return cell


def _grams(row: ArmResults) -> float | None:
    """Return the carbon of the whole line, as far as it is known."""
    own, reused = row.carbon_g.value, row.base_reuse.whole_g.value if row.base_reuse else None
    return None if own is None else own + (reused or 0.0)


def _note(results: Results) -> str:
    """Say once for all cells how they are known and what the marks mean."""
    rows, name = results.arms.values(), measures.written(results.measure)
    known = sorted({k for row in rows if (k := row.train_energy_j.provenance)})
    lost = verdict.margin(results)
    parts = []
    if results.comparisons:
        within = f" within {lost}" if lost else ""
        parts += [
            f"×: times the baseline, with its 95\u00a0% interval; ±: 95\u00a0% interval; all "
            f"{results.comparisons} arms together.",
            f"● keeps the {name}{within}, ○ not yet decided, ▽ loses. Bold: the interval leaves "
            "out ×1.",
        ]
    if results.baseline is not None:
        parts.append(floor.sentence(results))
    carbon = "CO₂e is of making it, base and teacher included"
    carbon += ", on an assumed grid." if results.assumed_grid else "."
    parts.append(f"Energy is {' and '.join(known) or 'not known'}. {carbon}")
    return " ".join(parts)
