"""The run record: one append-only file of JSON lines a process (rank), safe against kill -9.
Standard library only.

Line types (schema 1; units stand in the keys, mono_s is the machine's monotonic clock, clock_s the
wall clock's Unix time):

    header     run, name, arm, seed, inputs, attempt: which run; rank, world_size, launch: which
               process of it; host, boot_id, pid, clock_s, mono_s: where and when it began; parents:
               pids of the processes above it;
               nested_in: the run that counts this one, too;
               versions, cpu, command, git; components [{name, source, scope "process" or "machine",
               observation (a quantity below), coefficient {low, central, high, unit}, provenance,
               citation, reason, devices}]; pricing (the model's version); pue; carbon_intensity
               {value (g/kWh), zone, year, source, assumed}; embodied. Written again after the first
               second, so that damage to one line cannot cost the run.
    component  one entry of components that turned out otherwise (a device without a counter):
               replaces that name's, or is added
    sample     phase ("" is none, "train/epoch3" lies in "train"), and that phase's running totals,
               without those below it: wall_s, cpu_s (with children), ram_gb_s, cpu_j, dram_j,
               gpu_j, meter_j (counters; a source from outside has a quantity of its own), steal_s,
               steps, samples, flops (whichever are observed);
               "cpu_j_unseen_s" and the like: the seconds for which that quantity's counter told
               nothing that can be believed (below 0 where it then gave what belongs to phases
               before);
               "paused_wall_s", "paused_cpu_j" and the like: what passed, and what counters saw,
               while the process or what it runs was stopped: in no total above, and not the run's
               energy; mono_s and clock_s say when
    log        phase, mono_s, clock_s and values of the training at a moment: epoch, step, accuracy,
               loss
    fact       what holds for the run as a whole (accuracy, macs, params, latency_ms, data, …);
               later facts replace earlier ones. inference {batch_size, rounds}, operating_points
               [{setting, images, passes, …}], task_observed hold what readings of serving and tasks
               observed, with from_s and to_s; `serving.facts` gives their joules
    uses       another run this one builds on, or one that such a run does: role, name, runs, of
               (its children by name and seed), observed [{totals, components where they are not
               this record's own}]; never added
    labels     kind, why, name, count, phase: labels used or bought (`meters.labels`); of the
               same kind, why and name they count once, whatever start or process states them
    images     role, name, count, phase: images used, likewise
    note       text: a warning in words
    end        status "done", "failed" or "stopped", with the reason; mono_s, clock_s

Totals are cumulative by phase, so a damaged line in the middle costs nothing and a kill costs at
most the last sample. A record without an `end` line is a crashed run, or one whose process still
lives: it stays in all totals. Line types a reader does not know are skipped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from greenvis.core import files
from greenvis.errors import BadInput
from greenvis.meters.units import si

SCHEMA = 1
SUFFIX = ".jsonl"
MOST_BYTES = 256 * 2**20  # of one record
# phase: imports, checks, first calls of a process, before the arm whose record holds it; in no
# arm
STARTUP = "startup"
PAUSED = "paused_"  # before a quantity's name: of the time in which the process stood still

PARTLY_UNKNOWN: Literal["partly unknown"] = (
    "partly unknown"  # provenance of a figure from which something is missing
)
Provenance = Literal["measured", "estimated", "constant", "partly unknown"]
# the weakest last
PROVENANCES: tuple[Provenance, ...] = ("measured", "estimated", "constant", "partly unknown")
# follows a quantity's name: the seconds for which its counter told nothing that can be
# believed
UNSEEN = "_unseen_s"


# no dataclass in this file: its import costs a fifth of a tracker's start
class Reading(NamedTuple):
    """A figure with its band, how it was obtained, and, where it is missing (`value` None), why."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    method: str = ""
    provenance: Provenance = "estimated"
    reason: str = ""

    def __str__(self) -> str:
        """The figure as people read it: "24 J (17 – 33 J, estimated)"."""
        unit = {"j": "J", "g": "g"}.get(self.name.rpartition("_")[2], "")
        if self.value is None:
            return f"unknown ({self.reason or 'not observed'})"
        band = "" if self.low is None else f"{si(self.low, unit)} – {si(self.high, unit)}, "
        return f"{si(self.value, unit)} ({band}{self.provenance})"


class Run:
    """One record, read back. `totals[phase][quantity]` are running sums; a phase path reads
    "train/epoch3"."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.totals: dict[str, dict[str, float]] = {}
        self.logs: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.uses: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.end: dict[str, Any] | None = None
        self.last_s: float | None = (
            None  # on the machine's monotonic clock: when it was last written
        )
        self.damaged_lines = 0

    @property
    def id(self) -> str:
        """The run's id, unique over machines."""
        return str(self.header.get("run", self.path.stem))

    @property
    def status(self) -> str:
        """ "done", "failed" or "stopped" as its `end` line says. Where it has none: "running" while
        its process lives on this machine, else "crashed"."""
        if self.end:
            return str(self.end.get("status", "failed"))
        from greenvis.meters.header import is_running  # late: it is for few records

        return "running" if is_running(self.header) else "crashed"

    def sum(self, quantity: str, phase: str | None = None) -> float | None:
        """Sum a quantity over all phases, or over one phase and those below it. None where it was
        never observed."""
        values = [
            t[quantity]
            for name, t in self.totals.items()
            if quantity in t and (phase is None or name == phase or name.startswith(phase + "/"))
        ]
        return math.fsum(values) if values else None


def read(path: str | os.PathLike[str]) -> Run:
    """Read one record, whatever its end. Lines that are not JSON are counted and skipped.

    Raises BadInput where the file holds no header of a record, or one of a newer schema.
    """
    return parse(files.read(path, "record", MOST_BYTES), Path(path))


def parse(content: bytes, path: Path) -> Run:
    """Return the record that a content of `path` is, as `read` does. Raises BadInput as `read`
    does."""
    lines, damaged = _lines(content)
    header = next(
        (line for kind, line in lines if kind == "header" and isinstance(line.get("schema"), int)),
        None,
    )
    if header is None:
        raise BadInput(f"{path} is not a greenvis record: no header line in it")
    if header["schema"] > SCHEMA:
        raise BadInput(
            f"{path} is a record of schema {header['schema']}; this greenvis reads up to {SCHEMA}: "
            "upgrade it"
        )
    run = Run(path, {k: v for k, v in header.items() if k != "type"})
    run.damaged_lines = damaged + sum(not _take(run, kind, line) for kind, line in lines)
    return run


def is_empty(path: Path) -> bool:
    """Whether a file has no byte, as a process killed before its first line leaves it."""
    return path.is_file() and path.stat().st_size == 0


def readable(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Run]:
    """Yield the records among and below `paths`; what is none is left out with a warning, but for
    files without a byte.

    A process killed before its first line leaves such a file; it observed nothing.
    """
    import warnings  # late: a tracker's start pays for each import

    for path in find(paths):
        try:
            yield read(path)
        except BadInput as error:
            if not is_empty(path):
                warnings.warn(f"left out: {error}", stacklevel=2)


def timeline(path: str | os.PathLike[str]) -> Iterator[tuple[float, float, str, dict[str, float]]]:
    """Yield what phases observed from one moment of a record to the next: (from, to, phase,
    {quantity: step}).

    Moments are of the machine's monotonic clock; at each one, all phases that changed are written.
    """
    run = read(path)
    totals, at = Run(run.path, run.header), float(run.header.get("mono_s") or 0.0)
    before = at
    for kind, line in _lines(files.read(path, "record", MOST_BYTES))[0]:
        moment = line.get("mono_s", at)
        old = totals.totals.get(str(line.get("phase")), {})
        if kind == "sample" and isinstance(moment, (int, float)) and _take(totals, kind, line):
            if moment != at:
                before, at = at, moment
            phase = line["phase"]
            yield (
                before,
                at,
                phase,
                {q: v - old.get(q, 0.0) for q, v in totals.totals[phase].items()},
            )


def _lines(raw: bytes) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Return the lines that are a record's, with their types, and the number of those that are
    not."""
    texts = [text for text in raw.split(b"\n") if text.strip()]
    try:  # all at once is four times faster, and right where nothing is damaged
        parsed = json.loads(b"[" + b",".join(texts) + b"]")
    except (ValueError, RecursionError):
        parsed = []
    values = parsed if len(parsed) == len(texts) else map(parse_line, texts)
    lines = [
        (line["type"], line)
        for line in values
        if isinstance(line, dict) and isinstance(line.get("type"), str)
    ]
    return lines, len(texts) - len(lines)


def parse_line(text: bytes) -> Any:
    """Return a line's JSON, None where it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Yield the record files among `paths`: files as given, folders searched through. Raises
    BadInput for a missing one."""
    for entry in paths:
        path = Path(entry)
        if path.is_dir():
            yield from sorted(path.rglob("*" + SUFFIX))
        elif path.is_file():
            yield path
        else:
            raise BadInput(f"no record or folder at {path}")


def _take(run: Run, kind: str, line: dict[str, Any]) -> bool:
    """Put one line into `run`; False where its shape is wrong."""
    try:
        return _put(run, kind, line)
    except (
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
    ):  # a word for a number, a number beyond all floats: noise
        return False


def _put(run: Run, kind: str, line: dict[str, Any]) -> bool:
    moment = line.get("mono_s")
    if isinstance(moment, (int, float)) and math.isfinite(moment):
        run.last_s = max(moment, moment if run.last_s is None else run.last_s)
    if kind == "sample":
        phase = line.get("phase")
        if not isinstance(phase, str):
            return False
        numbers = {
            k: float(v) for k, v in line.items() if isinstance(v, (int, float)) and math.isfinite(v)
        }
        for moment in ("mono_s", "clock_s"):
            numbers.pop(moment, None)
        before = run.totals.get(phase)
        run.totals[phase] = {**before, **numbers} if before else numbers
        return True
    values = {k: v for k, v in line.items() if k != "type"}
    if kind == "log":
        # what had been observed so far, so that accuracy can be drawn over energy
        run.logs.append({**values, "totals": dict(run.totals)})
    elif kind == "fact":
        run.facts.update(values)
    elif kind == "uses":
        run.uses.append(values)
    elif kind == "labels":
        run.labels.append(values)
    elif kind == "images":
        run.images.append(values)
    elif kind == "component":
        run.header["components"] = replaced(run.header.get("components") or [], values)
    elif kind == "note":
        run.notes.append(str(values.get("text", "")))
    elif kind == "end":
        run.end = values
    return True


def replaced(
    components: Iterable[Mapping[str, Any]], new: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Return the components with `new` in the place of its name's, or after them."""
    out = {c.get("name"): c for c in components}
    return [*(out | {new.get("name"): new}).values()]
