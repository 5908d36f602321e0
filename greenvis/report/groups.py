"""Records to seed runs: ranks merged by host, attempts of one (name, arm, seed, inputs) kept
together, nothing lost."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from greenvis.errors import BadInput, printable
from greenvis.meters import pricing, record, serving
from greenvis.meters.coefficients import Repricing
from greenvis.meters.record import STARTUP, Reading
from greenvis.report import measures, overlap, schema
from greenvis.report.facts import COUNTS, Ancestor, Facts, Setup
from greenvis.report.parts import Part, by_stage, curve, stage, summarize, summed, training_energy_j
from greenvis.report.runs import APART, Curve, RunSummary, SeedRun, total
from greenvis.tasks.base import Measure

# facts of older records that hold joules, and those that hold the observations now
STORED = {"inference_energy_j": "inference", "task_energy_j": "task_observed"}
NOTHING = 1e-3  # of its energy: a run that counts no more of it lies wholly in another


class Loaded(NamedTuple):
    """Seed runs, notes on what was left out, and the metric all are judged by."""

    groups: list[SeedRun]
    notes: list[str]
    measure: Measure


def load(
    paths: Iterable[str | os.PathLike[str]],
    metric: str | None = None,
    coefficients: str | os.PathLike[str] | None = None,
) -> Loaded:
    """Read every record among `paths` (files, folders, glob patterns) and group them.

    Args:
        paths: of records.
        metric: what they are judged by; by default what they say themselves (`measures.choose`).
        coefficients: a file whose coefficients price them in the place of their own.

    A record met twice (the same run id and rank) counts once, the more complete one. What cannot be
    believed is left out, with a note. Raises BadInput where there is no record at all.
    """
    reprice = _repriced(coefficients)
    parts: dict[tuple[str, int], Part] = {}
    notes, files = [], 0
    for path, asked in record_files(paths):
        files += 1
        try:
            run = record.read(path)
            notes += [*schema.check(run), *reprice(run)]
            part = summarize(run, metric or measures.DEFAULT)
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
    every = list(parts.values())
    measure = measures.choose(metric, ((Setup.of(p.run.header), p.run.facts) for p in every))
    if measure.name != (metric or measures.DEFAULT):
        for part in every:
            run = record.read(part.run.path)
            schema.check(run)
            reprice(run)
            part.curve = curve(run, measure.name)
    return Loaded(_group(every), sorted(notes), measure)


def _repriced(coefficients: str | os.PathLike[str] | None) -> Callable[[record.Run], list[str]]:
    """Return what gives a record the coefficients of a file, and says what of it they cannot
    price."""
    if coefficients is None:
        return lambda run: []
    file = Repricing(coefficients)

    def reprice(run: record.Run) -> list[str]:
        cpu = str((run.header.get("cpu") or {}).get("name") or "")
        run.header["components"] = file.components(run.header.get("components") or [], cpu)
        for entry in (e for use in run.uses for e in use.get("observed") or ()):
            if "components" in entry:
                entry["components"] = file.components(entry["components"] or [], cpu)
        stored = [key for key in STORED if key in run.facts and STORED[key] not in run.facts]
        points = run.facts.get("operating_points") or []
        if any("passes" not in point for point in points):
            stored.append("operating_points")
        stored += [use["name"] for use in run.uses if use.get("energy_j")]
        return [
            f"{run.path.name} holds joules of {printable(name)} and not what was observed: they "
            "keep the coefficients of their time"
            for name in stored
        ]

    return reprice


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


def _count_once(parts: Iterable[Part]) -> dict[int, Reading]:
    """Give records that overlap their shares of what they saw in common. Returns what each of them
    saw, by its id()."""
    known = {p: part for part in parts if (p := overlap.span(part.run)) is not None}
    undivided: dict[int, Reading] = {}
    for span, pieces in overlap.pieces(list(known)).items():
        part = known[span]
        run, before = part.run, training_energy_j(part.run)
        undivided[id(part)] = total(r for c in pricing.phases(run).values() for r in c.values())
        header, shared, own = overlap.divided(run, pieces, run.header)
        run.header, run.totals, part.own = header, by_stage(shared), by_stage(own)
        after = training_energy_j(run)
        part.curve = [(j * after / before, y) for j, y in part.curve] if before else part.curve
        timed = [
            t
            for phase, t in shared.items()
            if stage(phase) == "measure" and t.get("samples", 0) > 0
        ]
        if part.inference:
            part.inference = (part.inference[0], summed(timed))
        run.facts = overlap.facts(run.facts, pieces)
    return undivided


def _group(parts: list[Part]) -> list[SeedRun]:
    undivided = _count_once(parts)
    by_run: dict[str, list[Part]] = {}
    for part in parts:
        by_run.setdefault(part.id, []).append(part)
    groups: dict[tuple[str, str, int, str], SeedRun] = {}
    for run_id in sorted(by_run):
        ranks = sorted(by_run[run_id], key=lambda p: p.rank)
        run = _merge(ranks, undivided)
        run.inside = _is_inside(run, ranks, by_run)
        if run.inside:
            run.own_j = run.own_j._replace(value=0.0, low=0.0, high=0.0)
        setup = run.setup
        key = (setup.name, setup.arm, setup.seed, setup.inputs)
        tracked = setup.inputs == run_id
        groups.setdefault(key, SeedRun(*key, tracked=tracked)).attempts.append(run)
    for group in groups.values():
        group.attempts.sort(key=lambda a: (a.setup.number, a.setup.start_s, a.id))
    return [groups[key] for key in sorted(groups)]


def _is_inside(run: RunSummary, ranks: list[Part], by_run: Mapping[str, list[Part]]) -> bool:
    """Whether another record here already counts all of a run."""
    timeless = not all(overlap.span(p.run) for p in ranks)  # it does not say when it ran
    if timeless and ranks[0].run.header.get("nested_in") in by_run:
        return True
    energy = run.total_energy_j.value
    return bool(energy) and (run.own_j.value or 0.0) < NOTHING * energy


def _merge(parts: list[Part], undivided: Mapping[int, Reading]) -> RunSummary:
    """Merge the ranks of one attempt: a machine's quantities once per (host, boot), processes'
    quantities summed."""
    first = parts[0]
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
        s
        for s in ("crashed", "failed", "stopped", "running", "done", *sorted(statuses))
        if s in statuses
    )
    facts = [serving.facts(r) for r in runs]
    return RunSummary(
        id=first.id,
        status=status,
        reason=next((p.reason for p in parts if p.status == status), ""),
        setup=Setup.of(first.run.header),
        facts=Facts.of(_merged_facts(facts) if len(facts) > 1 else facts[0]),
        uses=[Ancestor.read(line) for line in pricing.uses(first.run)],
        notes=list(dict.fromkeys(n for p in parts for n in p.notes)),
        totals={s: t for s, t in merged.totals.items() if s != STARTUP},
        energy={s: c for s, c in merged.energy.items() if s != STARTUP},
        curve=_curve(first, parts, merged),
        timed_j=pricing.add(timed) if timed else None,
        missing_ranks=merged.missing_ranks,
        damaged_lines=sum(p.damaged_lines for p in parts),
        startup_j=total(merged.energy.get(STARTUP, {}).values()),
        own_j=total(every),
        label_lines=[line for r in runs for line in r.labels],
        image_lines=[line for r in runs for line in r.images],
        seen_j=total(undivided[id(p)] for p in parts if id(p) in undivided),
    )


def _merged_facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first process's facts, with what was computed and read back by all processes of
    the run."""
    out, added = dict(facts[0]), {*COUNTS, "checked"} - {"bytes"}
    for key, value in out.items():
        every = [one[key] for one in facts if key in one]
        if isinstance(value, list) and all(
            isinstance(entry, Mapping) and "misses" in entry for entry in value
        ):
            out[key] = [
                {
                    **entry,
                    **{
                        k: sum(entries[i].get(k, 0) for entries in every if i < len(entries))
                        for k in entry
                        if k in added
                    },
                }
                for i, entry in enumerate(value)
            ]
    return out


def _curve(first: Part, parts: list[Part], merged: pricing.Merged) -> Curve:
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
