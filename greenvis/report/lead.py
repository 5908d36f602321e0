"""The first screen of a report: the verdict in a sentence, three figures and how sure they are."""

from __future__ import annotations

from greenvis.report import comparison, drawings, floor, formatting, frontier, measures, stats
from greenvis.report import verdict as verdicts
from greenvis.report.arm_results import ArmResults
from greenvis.report.blocks import Lead, Tile
from greenvis.report.estimates import Estimate, Ratio
from greenvis.report.frontier import Distance
from greenvis.report.shape import Results
from greenvis.report.verdict import Choice

MARKS = {"keeps": "●", "not yet decided": "○", "loses": "▽"}


def lead(results: Results) -> Lead:
    """Return what stands on the first screen: what was saved, what the metric did, what base and
    teacher add, how sure all that is, and the metric against energy."""
    chosen = verdicts.choice(results)
    row = results.arms[chosen.arm]
    tiles = (_energy(results, chosen), _metric(results, chosen.arm), _line(results, chosen))
    sure = tuple(x for x in _sure(results, row) if x)
    return Lead(verdicts.opening(results), tiles, sure, drawings.first(results))


def _energy(results: Results, chosen: Choice) -> Tile:
    """Return the energy that the verdict is about: the arm's own share."""
    row, key = results.arms[chosen.arm], verdicts.cost(results, chosen.arm)
    title = "Own training energy" if row.uses else "Training energy"
    if chosen.why == "saves":
        own = frontier.of_all(results, frontier.OWN)[chosen.arm]
        return _distance(results, own, title, row.train_energy_j)
    if key == "inference_energy":
        what = f"Energy per {results.unit}"
        return _beside(results, chosen.arm, key, what, "inference_energy_j")
    return _beside(results, chosen.arm, "train_energy", title, "train_energy_j")


def _line(results: Results, chosen: Choice) -> Tile:
    """Return the energy with base and teacher."""
    row, what = results.arms[chosen.arm], "Including base and teacher"
    if chosen.why == "saves" and row.uses:
        tile = _distance(results, chosen.distance, what, row.train_energy_with_reuse_j)
    elif row.uses:
        key = "train_energy_with_reuse"
        tile = _beside(results, chosen.arm, key, what, f"{key}_j")
    else:
        return Tile(what, "nothing more", f"{chosen.arm} builds on no trained base or teacher")
    joules = row.base_reuse.whole_j.value if row.base_reuse else None
    roles = " and ".join(dict.fromkeys(u.role for u in row.uses if u.energy_j.value is not None))
    more = [f"{roles} {formatting.si(joules, 'J')}"] if joules and roles else []
    more += [f"not counted: {name}, cost not known" for name in row.unknown]
    return Tile(what, tile.value, "; ".join([tile.sub, *more]))


def _beside(results: Results, label: str, key: str, what: str, reading: str) -> Tile:
    """Return an energy beside the baseline's, or alone where it is compared with nothing."""
    row, base = results.arms[label], results.baseline
    own: Estimate = getattr(row, reading)
    ratio = row.ratio(key)
    if ratio is None or ratio.low is None or base is None:
        band = _band(own)
        alone = "one seed: compared with nothing" if len(row.seeds) == 1 else ""
        known = own.value is not None
        sub = "; ".join(x for x in (band, alone) if x) or ("" if known else "not known")
        return Tile(what, formatting.reading(own, "J"), sub)
    theirs: Estimate = getattr(results.arms[base], reading)
    joules = f"{label} {formatting.reading(own, 'J')}, {base} {formatting.reading(theirs, 'J')}"
    value, sure = _change(ratio)
    return Tile(what, value, f"{sure}; {joules}")


def _distance(results: Results, distance: Distance, what: str, own: Estimate) -> Tile:
    """Return an energy beside that of plain training at the same metric."""
    joules, name = formatting.reading(own, "J"), measures.written(results.measure)
    if distance.ratio is None or distance.ratio.low is None:
        return Tile(what, joules, f"not read against plain training: {distance.why or 'one seed'}")
    value, sure = _change(distance.ratio)
    return Tile(what, value, f"{sure}; {joules}, against plain training at the same {name}")


def _change(ratio: Ratio) -> tuple[str, str]:
    """Return a ratio in large letters, and its interval."""
    if ratio.low == ratio.high == 1:
        return "the same", "exactly"
    if not formatting.shown(ratio):
        band = formatting.factor_band(ratio)
        return formatting.factor(ratio), f"{band}: no difference shown"
    size, ends = formatting.change(ratio)
    return (
        f"{size} {'less' if ratio.ratio < 1 else 'more'}",
        f"95\u00a0%: {ends}" if ends else formatting.factor_band(ratio),
    )


def _metric(results: Results, label: str) -> Tile:
    """Return the metric with its interval, and what it is beside the baseline's."""
    row, measure = results.arms[label], results.measure
    title = measures.title(measure)
    mean = row.gain.mean
    if mean is None:
        return Tile(title, formatting.MISSING, "not recorded")
    parts = []
    if ends := interval(results, row):
        texts = [formatting.gain(measure, end) for end in ends]
        parts.append(f"95\u00a0%: {texts[0].removesuffix(chr(160) + '%')} to {texts[1]}")
    d, base = row.difference, results.baseline
    if d and d.low is not None:
        band = formatting.interval(measure, d, 1)
        moved = formatting.points(measure, d.mean, 1)
        parts.append(
            f"{moved} against {base} ({band}): {MARKS[d.verdict]} "
            f"{formatting.decided(d, verdicts.margin(results))}"
        )
    elif len(row.seeds) == 1:
        parts.append("one seed: no scatter is known")
    return Tile(title, formatting.gain(measure, mean), "; ".join(parts))


def interval(results: Results, row: ArmResults) -> tuple[float, float] | None:
    """Return the interval of an arm's metric: over its seeds, and of a share no narrower than the
    test's images allow. None where neither is known."""
    low, high = stats.interval(list(row.gain.by_seed.values()))
    ends = [] if low is None or high is None else [(low, high)]
    n, mean = comparison.images_tested(results), row.gain.mean
    if n and mean is not None and measures.is_share(results.measure):
        ends.append(stats.proportion(mean, n))
        ends = [(max(0.0, a), min(1.0, b)) for a, b in ends]
    return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else None


def _sure(results: Results, row: ArmResults) -> list[str]:
    """Say what the figures rest on."""
    seeds = sorted({len(r.seeds) for r in results.arms.values() if r.seeds}) or [0]
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    arms = f"{results.comparisons} comparison{'s' if results.comparisons > 1 else ''}"
    tested = comparison.tested(results)
    known = row.train_energy_j.provenance
    return [
        f"{many} seed{'s' if many != '1' else ''} per arm",
        f"intervals hold for all {arms} together" if results.comparisons else "",
        f"test of {tested}" if tested else "",
        f"energy {known}" if known else "",
        "carbon: grid assumed" if results.assumed_grid else "",
        f"noise floor of energy: {floor.brief(results)}" if results.comparisons else "",
    ]


def _band(reading: Estimate) -> str:
    """Return the band of a reading: "10 J to 150 J"."""
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return ""
    return f"{formatting.si(reading.low, 'J')} to {formatting.si(reading.high, 'J')}"
