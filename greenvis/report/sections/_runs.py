"""What all starts took, and which of them did not finish, in sentences."""

from __future__ import annotations

from greenvis.report import formatting
from greenvis.report.formatting import si
from greenvis.report.shape import Overlapping, Results, Totals

LOST = "Of this, starts that {} took {}: kept in all totals."
REPEATED = (
    "Starts that led to no shown result (repeated with --fresh, or broken off since) took {}."
)
NESTED = "{} start(s) ran inside another record's process: counted once in the total, by the outer."
STARTUP = (
    "Starting {} process(es) took {}: imports, checks, reading data, first calls of the libraries. "
    "It is in the total, and in no arm."
)
OVERLAP = (
    "{} start(s) overlap: they ran at the same time on one counter of the whole machine, or in one "
    "process. Together they read {}, and {} of it is counted: each joule once. What runs saw side "
    "by side is divided among them in equal parts, for nothing tells whose it was; a run that lies "
    "inside another shows what it saw."
)
OLDER = (
    "Runs of earlier versions of the same arms (other inputs) took {}: in the totals, not in the "
    "tables."
)
CRASHED = (
    "Crashed: the record has no end, as after kill -9 or a power cut. What was observed up to its "
    "last line counts; what came after (one sample's interval at most) is not."
)
DAMAGED = (
    "{} damaged line(s) in the records were skipped; totals are cumulative, so a damaged line "
    "costs at most what was observed since the one before."
)
PAUSED = (
    "Processes stood still for {} (stopped or suspended): what the machine and their memory drew "
    "meanwhile is in the records, but not charged to the runs."
)
MISSING = "{} process record(s) are missing: the energy is too low by them."
MOST_UNFINISHED = 20


def runs(results: Results) -> list[str]:
    """Say what all starts took, and what of it is where."""
    t, spent = results.totals, [row.spent for row in results.arms.values()]
    starts = ", ".join(f"{n} {s}" for s, n in t.attempts.items())
    repeated = sum(s.repeated_energy_j.value or 0 for s in spent)
    older = sum(s.older_inputs_energy_j.value or 0 for s in spent)
    lost, both = t.unfinished_energy_j.value, t.overlapping
    startup = t.startup_j.value if t.startup_j else None
    going = "running" in t.attempts
    lost_by = f"crashed, failed{', were stopped or still run' if going else ' or were stopped'}"
    sentences: list[tuple[object, str]] = [
        (lost, LOST.format(lost_by, _joules(lost))),
        (repeated, REPEATED.format(_joules(repeated))),
        (t.nested_runs, NESTED.format(t.nested_runs)),
        (t.starts, STARTUP.format(t.starts, _joules(startup))),
        (both and both.starts, _overlap(both)),
        (older, OLDER.format(_joules(older))),
        (t.attempts.get("crashed"), CRASHED),
        *((True, line) for line in _unfinished(results)),
        (results.damaged_lines, DAMAGED.format(results.damaged_lines)),
        (results.paused_s, PAUSED.format(formatting.duration(results.paused_s))),
        (results.missing_ranks, MISSING.format(results.missing_ranks)),
    ]
    first = (
        f"{t.runs} run(s), started {sum(t.attempts.values())} time(s): {starts}. All together: "
        f"{_spent(t)}."
    )
    return [first, *(line for known, line in sentences if known)]


def _joules(value: float | None) -> str:
    return si(value, "J")


def _overlap(both: Overlapping | None) -> str:
    if both is None:
        return ""
    return OVERLAP.format(both.starts, _joules(both.seen_j.value), _joules(both.counted_j.value))


def _unfinished(results: Results) -> list[str]:
    out = []
    for row in results.incomplete[:MOST_UNFINISHED]:
        why = f" ({row.reason})" if row.reason else ""
        tried = f"{', '.join(row.attempts)}{why}, {_joules(row.energy_j.value)} spent"
        out.append(f"Not finished: {row.arm}, seed {row.seed}: {tried}.")
    more = len(results.incomplete) - MOST_UNFINISHED
    return [*out, f"… and {more} more that did not finish."] if more > 0 else out


def _spent(totals: Totals) -> str:
    e, g = totals.energy_j.value, totals.carbon_g.value
    if e is None:
        return "energy unknown"
    return (
        f"{formatting.reading(totals.energy_j, 'J')} ({formatting.figures(e / 3600, 2)} Wh)"
        + (f", {formatting.reading(totals.carbon_g, 'g')} CO₂e" if g is not None else "")
        + f"; {formatting.lamp(e)} (10 W × time)"
    )
