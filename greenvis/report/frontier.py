"""The frontier: the least energy with which plain training reaches each value of the metric, and
how far an arm is from it at its own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from greenvis.report import formatting, label_curve, stats
from greenvis.report.arm_results import ArmResults
from greenvis.report.estimates import Estimate, Ratio
from greenvis.report.shape import Results

LEAST = 2  # plain arms that make a frontier
FEW, UNMEASURED = "fewer than two plain arms have this energy", "not measured"

MOST = 100  # arms that are read off
LINE, OWN = "Making it, with all it builds on", "Own training"
COSTS: dict[str, Callable[[ArmResults], Estimate]] = {
    LINE: lambda row: row.train_energy_with_reuse_j,
    OWN: lambda row: row.train_energy_j,
    "Per {unit}": lambda row: row.inference_energy_j,
}


class Point(NamedTuple):
    """A plain arm: joules, and the metric, turned so that more is better."""

    energy_j: float
    gain: float


@dataclass(frozen=True)
class Distance:
    """Energy of an arm ÷ that of the frontier at the same metric.

    Attributes:
        ratio: Geometric mean and interval over seeds, each read off its own plain arms; of the
            means, without an interval, where not each can be; None where these cannot be.
        at_least: The metric is worse than that of the cheapest plain arm, which `ratio` is to.
        why: Why there is no ratio.
    """

    ratio: Ratio | None = None
    at_least: bool = False
    why: str = ""

    @property
    def inside(self) -> bool:
        """Whether plain training is shown to do as well with less."""
        r = self.ratio
        return r is not None and r.ratio > 1 and (self.at_least or (r.low or 0.0) > 1)

    @property
    def saves(self) -> bool:
        """Whether it is shown to need less than plain training for as much of the metric."""
        r = self.ratio
        return r is not None and not self.at_least and r.high is not None and r.high < 1


def plain_arms(results: Results, beside: ArmResults | None = None) -> dict[str, ArmResults]:
    """Return the arms of plain training: no technique, no labels that a query chose, no made
    images, and built on nothing that was made for them.

    Args:
        results: Of a report.
        beside: An arm they are compared with: those with as many labels as it has.
    """
    labels = None if beside is None else label_curve.used(beside)
    return {
        a: row
        for a, row in results.rows.items()
        if not row.technique_names
        and all(use.energy_j.value is None for use in row.uses)
        and row.continual is None
        and not row.query
        and not row.images.get("synthetic")
        and row.gain.mean is not None
        and (beside is None or label_curve.used(row) == labels)
    }


def distances(
    results: Results, labels: Iterable[str], cost: Callable[[ArmResults], Estimate]
) -> dict[str, Distance]:
    """Return how far arms are from the frontier of the plain arms beside each. Intervals hold for
    all of them together with 95 %.

    Args:
        results: Of a report.
        labels: The arms.
        cost: Which of their energies: one of `COSTS`.
    """
    read_off = {label: _read_off(results, label, cost) for label in labels}
    logs = {
        label: off.logs
        for label, off in read_off.items()
        if isinstance(off, _ReadOff) and 1 < len(off.logs) == off.seeds
    }
    means, out = stats.means(logs), {}
    for label, off in read_off.items():
        if isinstance(off, Distance):
            out[label] = off
            continue
        mean, low, high = means.get(label, (math.log(off.ratio), None, None))
        ratio = Ratio(
            ratio=math.exp(mean),
            low=None if low is None else math.exp(low),
            high=None if high is None else math.exp(high),
            n=results.arms[label].gain.n,
        )
        out[label] = Distance(ratio, off.at_least)
    return out


def of_all(results: Results, cost: str = LINE) -> dict[str, Distance]:
    """Return how far the arms that are not plain are from the frontier; none where there are too
    few plain arms.

    Args:
        results: Of a report.
        cost: Which of their energies: a name of `COSTS`.
    """
    plain = plain_arms(results)
    rows = [a for a in results.order if a not in plain and results.arms[a].gain.n]
    if len(plain) < LEAST or not rows:
        return {}
    return distances(results, rows[:MOST], COSTS[cost])


def cell(d: Distance) -> str:
    """Return a distance for a table."""
    if d.ratio is None:
        return formatting.MISSING
    text = f"×{formatting.figures(d.ratio.ratio)}"
    if d.at_least:
        return f"{text} or more"
    band = formatting.factor_band(d.ratio)
    return f"{text} ({band})" if band else text


def finding(d: Distance) -> str:
    """Return what the distance of the whole line says."""
    if d.inside:
        return "inside the frontier: plain training does it for less"
    if d.saves:
        return "saves"
    if d.ratio is None:
        return d.why
    if d.ratio.n == 1:
        return "one seed: not decided"
    some = d.ratio.low is None
    return "not decided: not each seed could be read off" if some else "not yet decided"


def sentence(results: Results, label: str, d: Distance) -> str:
    """Say how far an arm's whole line is from the frontier; of one inside it also when it would
    not be: at which energy, or which metric."""
    said = finding(d) if d.ratio is None else f"{cell(d)}: {finding(d)}"
    row = results.arms[label]
    energy = COSTS[LINE](row).value
    if not d.inside or d.ratio is None or energy is None:
        return said
    plain = [p for p in plain_arms(results, row).values() if p is not row]
    sign = -1.0 if results.lower_is_better else 1.0
    points = [Point(e, sign * g) for p in plain for e, g in _means(p, COSTS[LINE])]
    least = formatting.si(energy / d.ratio.ratio, "J")
    rival = formatting.gain(results.measure, sign * reached(points, energy))
    word = "below" if results.lower_is_better else "above"
    return f"{said}; outside it with less than {least}, or {word} {rival} with as much"


def reached(points: list[Point], energy_j: float) -> float:
    """Return the gain that plain training reaches with so many joules: interpolated on their
    logarithm between neighbours on the front of the points, that of its end beyond them.

    Args:
        points: Of the plain arms, one or more with an energy.
        energy_j: Joules.
    """
    named = {str(i): p for i, p in enumerate(points) if p.energy_j > 0}
    front = [named[name] for name in stats.pareto(named)]
    for a, b in pairwise(front):
        if a.energy_j <= energy_j < b.energy_j:
            share = math.log(energy_j / a.energy_j) / math.log(b.energy_j / a.energy_j)
            return a.gain + share * (b.gain - a.gain)
    return front[0 if energy_j < front[0].energy_j else -1].gain


class _ReadOff(NamedTuple):
    """An arm beside its frontier: the ratio of the means; the logarithms of the seeds that could be
    read off, and how many seeds there are."""

    ratio: float
    at_least: bool
    logs: dict[str, float]
    seeds: int


def _read_off(
    results: Results, label: str, cost: Callable[[ArmResults], Estimate]
) -> _ReadOff | Distance:
    row = results.arms[label]
    plain = {a: p for a, p in plain_arms(results, row).items() if a != label}
    sign = -1.0 if results.lower_is_better else 1.0
    points = [Point(e, sign * g) for p in plain.values() for e, g in _means(p, cost)]
    own = _means(row, cost)
    if len(points) < LEAST or not own:
        return Distance(why=FEW if own else UNMEASURED)
    energy, gain = own[0][0], sign * own[0][1]
    front, at_least, why = read(points, gain)
    if front is None or energy <= 0 or (at_least and energy < front):
        return Distance(why=why or "cheaper and worse than all plain arms")
    seeds = _by_seed(row, cost)
    each = {s: _of_seed(plain, s, sign, cost, g) for s, (_, g) in seeds.items()}
    logs = {s: math.log(seeds[s][0] / e) for s, e in each.items() if e and seeds[s][0] > 0}
    return _ReadOff(energy / front, at_least, logs, len(seeds))


def read(points: list[Point], gain: float) -> tuple[float | None, bool, str]:
    """Return the least energy with which plain arms reach a gain.

    Args:
        points: Of the plain arms.
        gain: The metric, turned so that more is better.

    Returns:
        Joules, interpolated on their logarithm between neighbours on the front of the points and
        never beyond them; whether they are those of the cheapest point, whose metric is better;
        and why there are none.
    """
    named = {str(i): p for i, p in enumerate(points) if p.energy_j > 0}
    front = [named[name] for name in stats.pareto(named)]
    if not front:
        return None, False, FEW
    if gain > front[-1].gain:
        return None, False, "better than all plain arms"
    if gain <= front[0].gain:
        return front[0].energy_j, gain < front[0].gain, ""
    for a, b in pairwise(front):
        if gain <= b.gain:
            share = (gain - a.gain) / (b.gain - a.gain)
            low, high = math.log(a.energy_j), math.log(b.energy_j)
            return math.exp(low + share * (high - low)), False, ""
    raise AssertionError("a gain above the first and not above the last lies between two")


def on_front(results: Results, plain: Mapping[str, ArmResults]) -> list[str]:
    """Return the plain arms that no other beats in both making energy and metric, by energy."""
    sign = -1.0 if results.lower_is_better else 1.0
    cost = COSTS[LINE]
    points = {a: (e, sign * g) for a, row in plain.items() for e, g in _means(row, cost)}
    return stats.pareto(points)


def _means(row: ArmResults, cost: Callable[[ArmResults], Estimate]) -> list[tuple[float, float]]:
    energy, metric = cost(row).value, row.gain.mean
    return [] if energy is None or metric is None else [(energy, metric)]


def _by_seed(
    row: ArmResults, cost: Callable[[ArmResults], Estimate]
) -> dict[str, tuple[float, float]]:
    energies = cost(row).seeds
    return {s: (energies[s], g) for s, g in row.gain.by_seed.items() if s in energies}


def _of_seed(
    plain: Mapping[str, ArmResults],
    seed: str,
    sign: float,
    cost: Callable[[ArmResults], Estimate],
    metric: float,
) -> float | None:
    """Return the frontier's joules at a metric, of the plain arms' runs with one seed; None where
    they do not reach around it."""
    runs = [_by_seed(row, cost).get(seed) for row in plain.values()]
    points = [Point(e, sign * g) for e, g in (r for r in runs if r is not None)]
    joules, bound, _ = read(points, sign * metric)
    return joules if len(points) >= LEAST and not bound else None
