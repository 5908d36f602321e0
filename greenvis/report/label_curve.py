"""What labels are worth: labels spared by a technique and the joules they took, read off a measured
supervised label curve, between its points and never beyond them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from greenvis.meters import labels
from greenvis.report import measures, stats
from greenvis.report.arm_results import ArmResults
from greenvis.report.shape import Results

LEAST = 4  # budgets of a curve that may be read
SPARES_NONE = "it spares no label"
UNMATCHED = "not every budget of the label curve has its seed"


class Point(NamedTuple):
    """A training: labels used, its metric, and its joules with all it builds on."""

    labels: float
    metric: float
    energy_j: float


class Training(NamedTuple):
    """A training: means over seeds, and each seed's own."""

    mean: Point
    by_seed: dict[str, Point]


@dataclass(frozen=True)
class Worth:
    """What an arm's labels are worth. Figures are None where `why` says why they were not read off.

    Attributes:
        per_point_j: Joules more than the arm of as many labels and no technique, for each point of
            a share, or unit of another metric, that it gains.
        same: Labels with which training on labels alone reaches the same metric: the geometric mean
            over seeds, each read off its own curve; off that of the means where a seed lies off.
        same_interval: Of `same` over seeds; None where not every seed could be read off.
        rate_j: Extra joules per label spared, the quotient of their means over seeds.
        low, high: Interval of `rate_j` over seeds, Fieller's. `low` alone is known where that no
            label is spared is not excluded; neither where any rate may be true.
        why: What of the means could not be read off.
        why_open: Why there is no interval.
    """

    per_point_j: float | None = None
    same: float | None = None
    same_interval: tuple[float, float] | None = None
    rate_j: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""
    why_open: str = ""


def used(row: ArmResults) -> float | None:
    """Return all labels an arm used, for whatever purpose, reviews left out; None: not known."""
    known = [part.count or 0.0 for part in row.labels if part.kind != "review"]
    return math.fsum(known) if known else None


def hours(row: ArmResults, results: Results) -> dict[str, float] | None:
    """Return {"low", "central", "high"} hours that a person gives an arm's labels and reviews."""
    spent: dict[str, float] = {}
    for part in row.labels:
        spent[part.kind] = spent.get(part.kind, 0.0) + (part.count or 0.0)
    table = {kind: s.model_dump() for kind, s in results.label_seconds.items()}
    return labels.hours(spent, table) if spent and spent.keys() <= table.keys() else None


def label_only(results: Results) -> dict[str, ArmResults]:
    """Return the arms trained on labelled images alone, without a technique: the label curve. Where
    labels were drawn in rounds, each round's training is a point of it."""
    return {
        a: row
        for a, row in results.rows.items()
        if not row.technique_names
        and not row.uses
        and used(row) is not None
        and not any(n for role, n in row.images.items() if role != "labelled")
        and row.seeds
        and row.query in ("", "random")
    }


def worth(results: Results, label: str) -> Worth:
    """Return what an arm's labels are worth beside the label curve of arms with its network."""
    row = results.arms[label]
    plain = {
        a: p for a, p in label_only(results).items() if a != label and _network(p) == _network(row)
    }
    sign = 1.0 if results.measure.higher_is_better else -1.0
    own, curve = _training(row), _best(_curve(plain.values()), sign)
    if own is None:
        return Worth(why="its labels, metric or energy are not known")
    beside = next((t.mean for t in curve if t.mean.labels == own.mean.labels), None)
    per_point = None if beside is None else _per_point(results, own.mean, beside)
    if len(curve) < LEAST:
        why = f"the arms on labels alone have {len(curve)} budget(s), and {LEAST} are needed"
        return Worth(per_point, why=why)
    readings = _readings(own, curve, sign)
    if isinstance(readings, str):
        same, rate, why = exchange(_front((t.mean for t in curve), sign), own.mean, sign)
        return Worth(per_point, same, rate_j=rate, why=why, why_open=readings if not why else "")
    logs = [math.log(r.same) for r in readings.values()]
    same = math.exp(math.fsum(logs) / len(logs))
    low, high = stats.interval(logs)
    band = None if low is None or high is None else (math.exp(low), math.exp(high))
    if same <= own.mean.labels:
        return Worth(per_point, same, band, why=SPARES_NONE)
    pairs = [(r.extra_j, r.same - own.mean.labels) for r in readings.values()]
    rate = math.fsum(j for j, _ in pairs) / math.fsum(n for _, n in pairs)
    return Worth(per_point, same, band, rate, *stats.quotient(pairs))


def exchange(
    curve: Sequence[Point], point: Point, sign: float = 1.0
) -> tuple[float | None, float | None, str]:
    """Read a training off a curve of trainings on labels alone.

    Args:
        curve: By labels, at least two of different budgets.
        point: What is read off.
        sign: -1 where less of the metric is better.

    Returns:
        Labels with which the curve reaches the point's metric, extra joules per label spared, and
        why either is None: (E - E of the curve there) ÷ (labels there - labels), both interpolated
        on the logarithm of the labels.
    """
    met = _met(curve, point, sign)
    if isinstance(met, str):
        return None, None, met
    same, joules = met
    if same <= point.labels:
        return same, None, SPARES_NONE
    return same, (point.energy_j - joules) / (same - point.labels), ""


def _met(curve: Sequence[Point], point: Point, sign: float) -> tuple[float, float] | str:
    """Return labels and joules with which the curve reaches a point's metric, or why it is not
    known."""
    crossings = [
        (a, b)
        for a, b in pairwise(curve)
        if min(a.metric, b.metric) <= point.metric <= max(a.metric, b.metric)
        and a.metric != b.metric
    ]
    if not crossings:
        best = max(p.metric * sign for p in curve)
        side = "better" if point.metric * sign > best else "worse"
        return f"it is {side} than all measured points of the label curve"
    met = [_between(a, b, point.metric) for a, b in crossings]
    if any(not math.isclose(n, met[0][0]) for n, _ in met):
        return "the label curve crosses its metric more than once"
    return met[0]


def _between(a: Point, b: Point, metric: float) -> tuple[float, float]:
    share = (metric - a.metric) / (b.metric - a.metric)
    low, high = math.log(max(a.labels, 1.0)), math.log(max(b.labels, 1.0))
    return math.exp(low + share * (high - low)), a.energy_j + share * (b.energy_j - a.energy_j)


def _per_point(results: Results, point: Point, beside: Point) -> float | None:
    sign = 1.0 if results.measure.higher_is_better else -1.0
    gained = sign * (point.metric - beside.metric)
    scale = 100.0 if measures.is_share(results.measure) else 1.0
    return (point.energy_j - beside.energy_j) / (gained * scale) if gained > 0 else None


def _network(row: ArmResults) -> object:
    return (row.network or [None])[0]


def _curve(rows: Iterable[ArmResults]) -> list[Training]:
    """Return the trainings of arms on labels alone: one per arm; and those of rounds, each from the
    first weights, where no arm has as many labels."""
    every = list(rows)
    out = [t for r in every if len(r.label_rounds) < 2 and (t := _training(r))]
    budgets = {t.mean.labels for t in out}
    for t in (t for r in every if len(r.label_rounds) > 1 for t in _rounds(r)):
        if t.mean.labels not in budgets:
            budgets.add(t.mean.labels)
            out.append(t)
    return out


def _best(curve: Iterable[Training], sign: float) -> list[Training]:
    """Return the best training on each number of labels: what these labels are good for alone."""
    best: dict[float, Training] = {}
    for one in curve:
        other = best.get(one.mean.labels)
        if other is None or sign * one.mean.metric > sign * other.mean.metric:
            best[one.mean.labels] = one
    return [*best.values()]


def _training(row: ArmResults) -> Training | None:
    """Return an arm's training; None where its labels, metric or energy are not known."""
    n, spent = used(row), row.train_energy_with_reuse_j
    metric, joules = row.gain.mean, spent.value
    if n is None or metric is None or joules is None:
        return None
    return Training(Point(n, metric, joules), _by_seed(n, row.gain.by_seed, spent.seeds))


def _rounds(row: ArmResults) -> Iterator[Training]:
    """Yield the training of each round in which an arm bought labels, with its own energy alone."""
    for one in row.label_rounds:
        joules = stats.summary(one.energy_j).mean
        if one.gain.mean is not None and joules is not None:
            point = Point(one.labels, one.gain.mean, joules)
            yield Training(point, _by_seed(one.labels, one.gain.by_seed, one.energy_j))


def _by_seed(
    labels: float, metric: Mapping[str, float], joules: Mapping[str, float]
) -> dict[str, Point]:
    return {s: Point(labels, m, joules[s]) for s, m in metric.items() if s in joules}


def _front(points: Iterable[Point], sign: float) -> list[Point]:
    """Return, by labels, the points better than all with fewer: what so many are good for."""
    out: list[Point] = []
    for point in sorted(points):
        if not out or sign * point.metric > sign * out[-1].metric:
            out.append(point)
    return out


class _Reading(NamedTuple):
    """A seed read off its own curve: the labels of the curve, and the joules beyond it."""

    same: float
    extra_j: float


def _readings(own: Training, curve: Sequence[Training], sign: float) -> dict[str, _Reading] | str:
    """Return each seed's reading, or why not every seed has one."""
    readings: dict[str, _Reading] = {}
    off: Counter[str] = Counter()
    for seed, point in own.by_seed.items():
        points = [t.by_seed[seed] for t in curve if seed in t.by_seed]
        met = _met(_front(points, sign), point, sign) if len(points) == len(curve) else UNMATCHED
        if isinstance(met, str):
            off[met] += 1
        else:
            readings[seed] = _Reading(met[0], point.energy_j - met[1])
    if off or not readings:
        why, n = off.most_common(1)[0] if off else (UNMATCHED, 0)
        return f"{n} of {len(own.by_seed)} seeds: {why}"
    return readings
