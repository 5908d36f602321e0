"""One record boiled down as it is read (totals by stage, the learning curve, facts), so that ten
thousand of them fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from greenvis.meters import pricing
from greenvis.meters.record import Run
from greenvis.report import overlap
from greenvis.report.facts import is_number, whole_number
from greenvis.report.runs import APART, Curve, total

OTHER = "other"  # time in no phase: set-up, loading
CURVE_POINTS = 400


@dataclass(slots=True)
class Part:
    """One record (a process, a rank) boiled down. `run.totals[stage][quantity]` are sums over the
    phases of a stage."""

    id: str
    rank: int
    status: str
    run: Run  # header, facts, what it uses and totals by stage, no logs
    notes: list[str]
    curve: Curve  # (joules so far in this record, metric)
    # samples, totals of the phases that timed inference
    inference: tuple[float, dict[str, float]] | None
    damaged_lines: int
    reason: str
    own: overlap.Totals | None = None  # of its totals what counts once among all runs; None: all


@lru_cache(maxsize=10_000)
def stage(phase: str) -> str:
    """Return the stage a phase path counts for: its first part, "teacher" wherever one is named,
    "other" for none."""
    parts = phase.split("/")
    return "teacher" if "teacher" in parts else parts[0] or OTHER


def summarize(run: Run, metric: str) -> Part:
    """Return what a report needs of one process's record: totals by stage, curve, facts."""
    stages: dict[str, dict[str, float]] = {}
    timed: dict[str, float] = {}
    for phase, totals in run.totals.items():
        add(stages.setdefault(stage(phase), {}), totals)
        if stage(phase) == "measure" and totals.get("samples", 0) > 0:
            add(timed, totals)
    small = Run(run.path, run.header)
    small.facts, small.uses = run.facts, run.uses
    small.labels, small.images = run.labels, run.images
    small.last_s = run.last_s
    small.totals.update(stages)
    small.end = run.end
    return Part(
        run.id,
        whole_number(run.header.get("rank")),
        run.status,
        small,
        run.notes,
        curve(run, metric),
        (timed["samples"], timed) if timed else None,
        run.damaged_lines,
        str((run.end or {}).get("reason") or ""),
    )


def curve(run: Run, metric: str) -> Curve:
    """Return (joules so far, metric) at each log. Only phases that moved since the log before are
    priced anew."""
    logs = [x for x in run.logs if is_number(x.get(metric))]
    weights = _weights(run) if logs else {}
    points: Curve = []
    latest: dict[str, Mapping[str, float]] = {}
    joules: dict[str, float] = {}
    for log in logs[:: max(1, len(logs) // CURVE_POINTS)]:
        for phase, totals in log["totals"].items():
            if latest.get(phase) is not totals and stage(phase) not in APART:
                latest[phase] = totals
                known = [totals[q] * w for q, w in weights.items() if q in totals]
                if known:
                    joules[phase] = sum(known)
        if joules:
            points.append((math.fsum(joules.values()), float(log[metric])))
    return points


def _weights(run: Run) -> dict[str, float]:
    """Return joules per unit of each observed quantity: the pricing model is linear."""
    components = run.header.get("components") or []
    quantities = {q for totals in run.totals.values() for q in totals}
    priced = {
        q: pricing.add(pricing.energy({q: 1.0}, components).values()).value
        for q in sorted(quantities)
    }
    return {q: w for q, w in priced.items() if w is not None}


def training_energy_j(run: Run) -> float:
    """Return the energy of the training, measuring and start-up left out."""
    return (
        total(r for s, c in pricing.phases(run).items() if s not in APART for r in c.values()).value
        or 0.0
    )


def by_stage(phases: overlap.Totals) -> overlap.Totals:
    """Add up the observations of phases by the stage each belongs to."""
    out: overlap.Totals = {}
    for phase, totals in phases.items():
        add(out.setdefault(stage(phase), {}), totals)
    return out


def summed(items: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up observations by quantity."""
    out: dict[str, float] = {}
    for totals in items:
        add(out, totals)
    return out


def add(into: dict[str, float], more: Mapping[str, float]) -> None:
    """Add totals to totals, by quantity."""
    for quantity, value in more.items():
        into[quantity] = into.get(quantity, 0.0) + value
