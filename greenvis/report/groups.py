"""Records to seed runs: ranks merged by host, attempts of one (name, arm, seed, inputs) kept
together, nothing lost.

A record is boiled down as it is read (totals by stage, the learning curve, facts), so ten thousand
of them fit in memory.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput
from greenvis.meters import pricing, record, serving
from greenvis.meters.record import STARTUP, Reading, Run
from greenvis.report import cached_outputs, overlap, schema

OTHER = "other"  # time in no phase: set-up, loading
# stages that are not part of making the model: latency and FLOP measurement
APART = ("measure", "report", STARTUP)
CURVE_POINTS = 400
NOTHING = 1e-3  # of its energy: a run that counts no more of it lies wholly in another


@dataclass(slots=True)
class Part:
    """One record (a process, a rank) boiled down. `run.totals[stage][quantity]` are sums over the
    phases of a stage."""

    id: str
    rank: int
    status: str
    run: Run  # header, facts, what it uses and totals by stage, no logs
    notes: list[str]
    curve: list[tuple[float, float]]  # (joules so far in this record, metric)
    # samples, totals of the phases that timed inference
    inference: tuple[float, dict[str, float]] | None
    damaged_lines: int
    reason: str
    own: overlap.Totals | None = None  # of its totals what counts once among all runs; None: all


@dataclass
class Attempt:
    """One start of a run: its ranks merged. `energy[stage][component]` in joules."""

    id: str
    number: int
    start_s: float
    status: str
    header: dict[str, Any]
    facts: dict[str, Any]
    uses: list[dict[str, Any]]
    notes: list[str]
    totals: dict[str, dict[str, float]]
    energy: dict[str, dict[str, Reading]]
    curve: list[tuple[float, float]]
    inference_j: Reading | None
    missing_ranks: list[int]
    damaged_lines: int
    reason: str
    # what starting its process took: imports, checks, first calls; in the total, in no
    # arm
    startup_j: Reading
    # what of its energy counts in a sum of all runs: not what another record counts as
    # well
    own_j: Reading
    seen_j: Reading  # what its counters saw, with what other runs saw at the same time
    inside: bool = False  # another record here already counts all of it

    @cached_property
    def total_energy_j(self) -> Reading:
        """The energy of all its stages."""
        return _total(r for c in self.energy.values() for r in c.values())

    @cached_property
    def training_energy_j(self) -> Reading:
        """The energy of the stages that make the model: all but measurement."""
        return _total(r for s, c in self.energy.items() if s not in APART for r in c.values())


@dataclass
class SeedRun:
    """All attempts at one (name, arm, seed, inputs), in order."""

    name: str
    arm: str
    seed: int
    inputs: str
    tracked: bool  # made by gv.track: an arm of its own
    attempts: list[Attempt] = field(default_factory=list)

    @cached_property
    def done(self) -> Attempt | None:
        """The last finished attempt: it gives the results."""
        return next((a for a in reversed(self.attempts) if a.status == "done"), None)

    @cached_property
    def chain(self) -> list[Attempt]:
        """The attempts that led to the results: the last finished one and those that broke off
        before it.

        What finished earlier was repeated, not resumed: its energy is in the totals, not in the
        cost of this result.
        """
        ends = [i for i, a in enumerate(self.attempts) if a.status == "done"]
        return self.attempts[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1] + 1] if ends else []

    @cached_property
    def training_energy_j(self) -> Reading:
        """The energy that led to the result, but for measurement: set-up, train, teacher, eval,
        …"""
        return pricing.add(a.training_energy_j for a in self.chain)

    @cached_property
    def total_energy_j(self) -> Reading:
        """The energy that led to the result, measurement included."""
        return pricing.add(a.total_energy_j for a in self.chain)

    @property
    def newest_s(self) -> float:
        """When its last attempt began."""
        return max(a.start_s for a in self.attempts)


def _total(readings: Iterable[Reading]) -> Reading:
    items = list(readings)
    return (
        pricing.add(items) if items else Reading("energy_j", None, reason="no sample was recorded")
    )


@lru_cache(maxsize=10_000)
def stage(phase: str) -> str:
    """Return the stage a phase path counts for: its first part, "teacher" wherever one is named,
    "other" for none."""
    parts = phase.split("/")
    return "teacher" if "teacher" in parts else parts[0] or OTHER


def load(
    paths: Iterable[str | os.PathLike[str]], metric: str = "accuracy"
) -> tuple[list[SeedRun], list[str]]:
    """Read every record among `paths` (files, folders, glob patterns) and group them. Returns the
    groups and notes.

    A record met twice (the same run id and rank) counts once, the more complete one. What cannot be
    believed is left out, with a note. Raises BadInput where there is no record at all.
    """
    parts: dict[tuple[str, int], Part] = {}
    notes, files = [], 0
    for path, asked in record_files(paths):
        files += 1
        try:
            run = record.read(path)
            notes += schema.check(run)
            part = summarize(run, metric)
        except BadInput as error:
            if asked:
                raise
            notes.append(f"{path.name} was left out: {str(error).replace(str(path), path.name)}")
            continue
        known = parts.get((part.id, part.rank))
        if known is not None and _origin(known) != _origin(part):
            # as the run itself named its record
            named = part.run.path.name.startswith(f"{part.id}.")
            kept_, left = (
                (part, known)
                if named and not known.run.path.name.startswith(f"{part.id}.")
                else (known, part)
            )
            notes.append(
                f"{left.run.path.name} was left out: it claims the id of {kept_.run.path.name}, "
                "but is another run's"
            )
            parts[part.id, part.rank] = kept_
        elif known is None or _completeness(part) > _completeness(known):
            parts[part.id, part.rank] = part
    if not parts:
        where = ", ".join(f"'{p}'" for p in paths)
        raise BadInput(
            f"no run record (*{record.SUFFIX}) in {where or 'no path'}; {files} file(s) looked at. "
            + (f"Left out: {notes[0]}" if notes else "Run something first.")
        )
    return _group(list(parts.values())), sorted(notes)


def _origin(part: Part) -> list[Any]:
    """Return what tells one run from another that claims its id: where and when it began, and as
    what."""
    return [
        part.run.header.get(key)
        for key in ("host", "boot_id", "pid", "clock_s", "name", "arm", "seed", "inputs")
    ]


def _completeness(part: Part) -> tuple[bool, float, int]:
    """Return what orders two copies of one record: one that ended first, then the later, then the
    larger."""
    totals = part.run.totals.values()
    return (
        part.run.end is not None,
        max(part.run.last_s or 0.0, math.fsum(t.get("wall_s", 0.0) for t in totals)),
        sum(map(len, totals)),
    )


def record_files(paths: Iterable[str | os.PathLike[str]]) -> Iterable[tuple[Path, bool]]:
    """Yield (file, whether it was named by itself) of files, folders and glob patterns. Raises
    BadInput for none."""
    for entry in paths:
        text = os.fspath(entry)
        if glob.has_magic(text) and not os.path.exists(text):
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise BadInput(f"no file matches the pattern '{text}'")
            yield from (
                (Path(f), False) for f in matches if f.endswith(record.SUFFIX) and os.path.isfile(f)
            )
        else:
            yield from ((p, p == Path(entry)) for p in record.find([entry]))


def summarize(run: Run, metric: str) -> Part:
    """Return what a report needs of one process's record: totals by stage, curve, facts."""
    stages: dict[str, dict[str, float]] = {}
    timed: dict[str, float] = {}
    for phase, totals in run.totals.items():
        _add(stages.setdefault(stage(phase), {}), totals)
        if stage(phase) == "measure" and totals.get("samples", 0) > 0:
            _add(timed, totals)
    small = Run(run.path, run.header)
    small.facts, small.uses = run.facts, run.uses
    small.last_s = run.last_s
    small.totals.update(stages)
    small.end = run.end
    return Part(
        run.id,
        _int(run.header.get("rank")),
        run.status,
        small,
        run.notes,
        _curve(run, metric),
        (timed["samples"], timed) if timed else None,
        run.damaged_lines,
        str((run.end or {}).get("reason") or ""),
    )


def _curve(run: Run, metric: str) -> list[tuple[float, float]]:
    """Return (joules so far, metric) at each log. Only phases that moved since the log before are
    priced anew."""
    logs = [
        x for x in run.logs if isinstance(x.get(metric), (int, float)) and math.isfinite(x[metric])
    ]
    weights = _weights(run) if logs else {}
    points: list[tuple[float, float]] = []
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


def _count_once(parts: Iterable[Part]) -> dict[int, Reading]:
    """Give records that overlap their shares of what they saw in common. Returns what each of them
    saw, by its id()."""
    known = {p: part for part in parts if (p := overlap.span(part.run)) is not None}
    undivided: dict[int, Reading] = {}
    for span, pieces in overlap.pieces(list(known)).items():
        part = known[span]
        run, before = part.run, _making(part.run)
        undivided[id(part)] = _total(r for c in pricing.phases(run).values() for r in c.values())
        header, shared, own = overlap.divided(run, pieces, run.header)
        run.header, run.totals, part.own = header, _by_stage(shared), _by_stage(own)
        after = _making(run)
        part.curve = [(j * after / before, y) for j, y in part.curve] if before else part.curve
        timed = [
            t
            for phase, t in shared.items()
            if stage(phase) == "measure" and t.get("samples", 0) > 0
        ]
        if part.inference:
            part.inference = (part.inference[0], _sum(timed))
        run.facts = overlap.facts(run.facts, pieces)
    return undivided


def _making(run: Run) -> float:
    return (
        _total(
            r for s, c in pricing.phases(run).items() if s not in APART for r in c.values()
        ).value
        or 0.0
    )


def _by_stage(phases: overlap.Totals) -> overlap.Totals:
    out: overlap.Totals = {}
    for phase, totals in phases.items():
        _add(out.setdefault(stage(phase), {}), totals)
    return out


def _sum(items: Iterable[Mapping[str, float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for totals in items:
        _add(out, totals)
    return out


def _group(parts: list[Part]) -> list[SeedRun]:
    undivided = _count_once(parts)
    by_run: dict[str, list[Part]] = {}
    for part in parts:
        by_run.setdefault(part.id, []).append(part)
    groups: dict[tuple[str, str, int, str], SeedRun] = {}
    for run_id in sorted(by_run):
        attempt = _merge(sorted(by_run[run_id], key=lambda p: p.rank), undivided)
        h = attempt.header
        name = str(h.get("name") or "run")
        key = (name, str(h.get("arm") or name), _int(h.get("seed")), str(h.get("inputs") or ""))
        groups.setdefault(key, SeedRun(*key, tracked=key[3] == run_id)).attempts.append(attempt)
    for attempt in (a for g in groups.values() for a in g.attempts):
        total = attempt.total_energy_j.value
        if attempt.header.get("nested_in") in by_run and not all(
            map(overlap.span, (p.run for p in by_run[attempt.id]))
        ):
            attempt.inside = True  # it does not say when it ran
        else:
            attempt.inside = bool(total) and (attempt.own_j.value or 0.0) < NOTHING * total
        if attempt.inside:
            attempt.own_j = attempt.own_j._replace(value=0.0, low=0.0, high=0.0)
    for group in groups.values():
        group.attempts.sort(key=lambda a: (a.number, a.start_s, a.id))
    return [groups[key] for key in sorted(groups)]


def _merge(parts: list[Part], undivided: Mapping[int, Reading]) -> Attempt:
    """Merge the ranks of one attempt: a machine's quantities once per (host, boot), processes'
    quantities summed."""
    first = parts[0]
    h = first.run.header
    runs = [p.run for p in parts]
    merged = pricing.merge(runs)
    charged = pricing.charged(runs)
    every = [
        reading
        for part, components in zip(parts, charged, strict=True)
        for totals in (part.run.totals if part.own is None else part.own).values()
        for reading in pricing.energy(totals, components).values()
    ]
    timed = [
        _scaled(
            pricing.add(pricing.energy(part.inference[1], components).values()),
            1 / part.inference[0],
        )
        for part, components in zip(parts, charged, strict=True)
        if part.inference
    ]
    statuses = {p.status for p in parts}
    status = next(
        s for s in ("crashed", "failed", "stopped", "done", *sorted(statuses)) if s in statuses
    )
    return Attempt(
        first.id,
        _int(h.get("attempt")),
        _start(h),
        status,
        h,
        cached_outputs.merged([serving.facts(r) for r in runs])
        if len(parts) > 1
        else serving.facts(first.run),
        pricing.uses(first.run),
        list(dict.fromkeys(n for p in parts for n in p.notes)),
        {s: t for s, t in merged.totals.items() if s != STARTUP},
        {s: c for s, c in merged.energy.items() if s != STARTUP},
        _share(first, parts, merged),
        pricing.add(timed) if timed else None,
        merged.missing_ranks,
        sum(p.damaged_lines for p in parts),
        next((p.reason for p in parts if p.status == status), ""),
        _total(merged.energy.get(STARTUP, {}).values()),
        _total(every),
        _total(undivided[id(p)] for p in parts if id(p) in undivided),
    )


def _share(first: Part, parts: list[Part], merged: pricing.Merged) -> list[tuple[float, float]]:
    """Return rank 0's learning curve with the joules of all ranks (the others' are taken to grow in
    step)."""
    if len(parts) == 1 or not first.curve:
        return first.curve
    alone = pricing.add(
        r for s, c in pricing.phases(first.run).items() if s not in APART for r in c.values()
    ).value
    total = pricing.add(
        r for s, c in merged.energy.items() if s not in APART for r in c.values()
    ).value
    return [(j * total / alone, y) for j, y in first.curve] if alone and total else first.curve


def _scaled(reading: Reading, k: float) -> Reading:
    if reading.value is None:
        return reading
    low, high = reading.low, reading.high
    return Reading(
        reading.name, reading.value * k, None if low is None else low * k,
        None if high is None else high * k,
        reading.method, reading.provenance, reading.reason,
    )  # fmt: skip


def _add(into: dict[str, float], more: Mapping[str, float]) -> None:
    for quantity, value in more.items():
        into[quantity] = into.get(quantity, 0.0) + value


def _start(header: Mapping[str, Any]) -> float:
    value = header.get("clock_s", header.get("wall_s"))
    return float(value) if isinstance(value, (int, float)) else 0.0


def _int(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0
