"""Runs that other tools recorded, as arms of a report: emissions.csv of codecarbon, exports of
MLflow and of Weights & Biases (CSV or JSON)."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput, one_line
from greenvis.meters.pricing import JOULES_PER_KWH
from greenvis.meters.record import SCHEMA, SUFFIX

MOST_BYTES = 32 * 2**20
MOST_ROWS = 20_000
MOST_JOULES = 1e15
MOST_NAMED = 12  # columns that an error names

Row = Mapping[str, Any]  # by column; prefixes such as "metrics." taken off
PREFIXES = ("metrics.", "params.", "tags.", "summary.", "config.", "data.", "info.")
JOULES = {
    "energy_j": 1.0, "energy_joules": 1.0, "train_energy_j": 1.0, "energy_wh": 3600.0,
    "energy_kwh": JOULES_PER_KWH, "energy_consumed": JOULES_PER_KWH,
    "energy_consumed_kwh": JOULES_PER_KWH, "total_energy_kwh": JOULES_PER_KWH,
}  # fmt: skip
COMPONENTS = {"cpu": "cpu_energy", "gpu": "gpu_energy", "ram": "ram_energy"}  # of codecarbon, kWh
ARM = ("arm", "project_name", "mlflow.runname", "run_name", "name", "group")
SEED, RUN = ("seed", "random_seed"), ("run_id", "id", "run id", "run_uuid")
SECONDS = ("duration", "duration_s", "runtime", "_runtime", "train_s")
START = ("start_time", "timestamp", "created", "start time", "_timestamp")
STATUS = ("status", "state")
ENDS = {
    "finished": "done", "done": "done", "succeeded": "done", "": "done", "failed": "failed",
    "crashed": "failed", "killed": "stopped", "stopped": "stopped", "running": None,
}  # fmt: skip
# no result of a run, though they are numbers
ASIDE = {*JOULES, *COMPONENTS.values(), *SEED, *SECONDS, *START, "emissions", "emissions_rate",
         "cpu_power", "gpu_power", "ram_power", "cpu_count", "gpu_count", "longitude", "latitude",
         "ram_total_size", "pue", "_step", "end_time", "step"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One run of another tool."""

    run: str
    arm: str
    seed: int
    start_s: float
    seconds: float
    joules: dict[str, float]  # by component
    end: str | None
    header: dict[str, Any]
    facts: dict[str, Any]


@contextmanager
def converted(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[str | os.PathLike[str]]]:
    """Yield the paths with each export of another tool replaced by a folder of records.

    Raises:
        BadInput: For a CSV or JSON file that is no export this reads, with what it lacks.
    """
    if not any(is_export(path) for path in paths):
        yield list(paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        out: list[str | os.PathLike[str]] = []
        for i, path in enumerate(paths):
            if not is_export(path):
                out.append(path)
                continue
            own = Path(folder) / str(i)
            _write(own, Path(path), entries(Path(path)))
            out.append(own)
        yield out


def is_export(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names a CSV file, or a JSON file that is no results.json of ours."""
    file = Path(path)
    if not file.is_file() or file.suffix.lower() not in (".csv", ".json"):
        return False
    if file.suffix.lower() == ".csv":
        return True
    content = files.read_json(file, "export", 8 * MOST_BYTES)
    return isinstance(content, list) or (isinstance(content, dict) and "runs" in content)


def entries(path: Path) -> list[Entry]:
    """Return the runs in an export.

    Args:
        path: A CSV with a line per run, or JSON with an object per run.

    Raises:
        BadInput: For what is none, holds no energy, or more than `MOST_ROWS` runs.
    """
    rows = _csv(path) if path.suffix.lower() == ".csv" else _json(path)
    if not rows:
        raise BadInput(f"{path} holds no run: export at least one")
    if len(rows) > MOST_ROWS:
        raise BadInput(f"{path} holds {len(rows):,} runs; at most {MOST_ROWS:,} are read")
    columns = {key for row in rows for key in row}
    tool = _tool(columns)
    if not columns & {*JOULES, *COMPONENTS.values()}:
        known = ", ".join(sorted(columns)[:MOST_NAMED])
        raise BadInput(
            f"{path} has no column of energy: log one named {', '.join(sorted(JOULES))}; it has "
            f"{one_line(known)}"
        )
    shares = {key for key in columns if _is_share(key)}
    percent = {key for key in shares if any((_number(row.get(key)) or 0.0) > 1.5 for row in rows)}
    seen: dict[str, int] = defaultdict(int)
    out = []
    for row in sorted(rows, key=_start):
        arm = _arm(row, path)
        seed = _first(row, SEED)
        number = _number(seed)
        known = int(number) if number is not None and abs(number) < 2**31 else seen[arm]
        seen[arm] += 1
        out.append(_entry(row, tool, arm, known, percent, len(out)))
    return out


def _entry(
    row: Row, tool: str, arm: str, seed: int, percent: Iterable[str], position: int
) -> Entry:
    joules = {c: j for c, key in COMPONENTS.items() if (j := _joules(row, key, JOULES_PER_KWH))}
    total = next((j for key, unit in JOULES.items() if (j := _joules(row, key, unit))), None)
    if total is not None and not math.isclose(sum(joules.values()), total, rel_tol=0.01):
        joules = {"machine": total}
    numbers = {k: _number(v) for k, v in row.items() if k not in ASIDE}
    facts = {
        k: v / 100 if k in percent else v
        for k, v in numbers.items()
        if v is not None and not _is_setting(k, row)
    }
    if "accuracy" in facts and not 0 <= facts["accuracy"] <= 1:
        del facts["accuracy"]
    state = str(_first(row, STATUS) or "").strip().lower()
    run = str(_first(row, RUN) or "")
    key = f"{tool}/{run or json.dumps(row, sort_keys=True, default=str)}/{position}"
    kg, kwh = _number(row.get("emissions")), sum(joules.values()) / JOULES_PER_KWH
    zone = str(row.get("country_iso_code") or row.get("country_name") or "?")
    grid = {"value": kg * 1000 / kwh, "zone": zone, "source": tool} if kg and kwh else None
    return Entry(
        hashlib.sha256(key.encode()).hexdigest()[:16],
        arm,
        seed,
        _start(row),
        max(_number(_first(row, SECONDS)) or 0.0, 0.0),
        joules,
        ENDS.get(state, "done"),
        {
            "components": [_component(name, tool) for name in joules],
            "carbon_intensity": grid,
            "cpu": {"name": str(row["cpu_model"])} if row.get("cpu_model") else None,
            "gpu": {"name": str(row["gpu_model"])} if row.get("gpu_model") else None,
            "versions": {tool: str(row.get(f"{tool}_version") or "?")},
        },
        facts,
    )


def _component(name: str, tool: str) -> dict[str, Any]:
    return {
        "name": name, "source": tool, "scope": "process", "observation": f"{name}_j",
        "provenance": "estimated", "coefficient": {"central": 1.0, "unit": "J per J"},
        "reason": f"as {tool} recorded it: by which counter or model, its export does not say",
    }  # fmt: skip


def _write(folder: Path, path: Path, runs: Iterable[Entry]) -> None:
    """Write a record per run."""
    folder.mkdir()
    attempts: dict[tuple[str, int], int] = defaultdict(int)
    for run in runs:
        attempts[run.arm, run.seed] += 1
        header = {
            "schema": SCHEMA, "run": run.run, "name": path.stem[:80], "arm": run.arm,
            "seed": run.seed, "inputs": f"{path.stem[:80]}/{run.arm}",
            "attempt": attempts[run.arm, run.seed], "clock_s": run.start_s,
            "pue": 1.0, **run.header,
        }  # fmt: skip
        observed = {f"{name}_j": joules for name, joules in run.joules.items()}
        lines = [
            {"type": "header", **header},
            {"type": "sample", "phase": "train", "wall_s": run.seconds, **observed},
            {"type": "fact", **run.facts},
        ]
        if run.end is not None:
            lines.append({"type": "end", "status": run.end, "reason": "", "mono_s": run.seconds})
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
        files.write(folder / f"{run.run}{SUFFIX}", text)


def _csv(path: Path) -> list[Row]:
    text = files.read_text(path, "export", MOST_BYTES).lstrip("\ufeff")
    first = text.partition("\n")[0]
    comma = max(",;\t", key=first.count)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=comma)
        return [_plain({k: v for k, v in row.items() if k}) for row in reader]
    except csv.Error as error:
        raise BadInput(f"{path} is no CSV: {error}") from error


def _json(path: Path) -> list[Row]:
    content = files.read_json(path, "export", MOST_BYTES)
    runs = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise BadInput(f"{path} is no export: it is to be a list of runs, or hold one as 'runs'")
    return [_plain(_flat(run)) for run in runs]


def _flat(run: Mapping[str, Any], at: str = "", depth: int = 3) -> dict[str, Any]:
    """Return a run of nested sections as columns; a list of {"key", "value"} is a section."""
    out: dict[str, Any] = {}
    for key, value in run.items():
        if isinstance(value, list) and all(isinstance(v, dict) for v in value):
            value = {str(v["key"]): v["value"] for v in value if {"key", "value"} <= v.keys()}
        if isinstance(value, dict) and depth:
            out |= _flat(value, f"{at}{key}.", depth - 1)
        elif not isinstance(value, (dict, list)):
            out[f"{at}{key}"] = value
    return out


def _plain(row: Mapping[str, Any]) -> Row:
    """Return a row by its plain names in small letters; what is a parameter keeps "config." in
    front."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        name = str(key).strip().lower()
        while any(name.startswith(p) for p in PREFIXES):
            prefix = next(p for p in PREFIXES if name.startswith(p))
            name = name.removeprefix(prefix)
            if prefix in ("params.", "config."):
                out[f"setting:{name}"] = True
        if value not in (None, ""):
            out.setdefault(name, value)
    return out


def _is_setting(name: str, row: Row) -> bool:
    return name.startswith("setting:") or f"setting:{name}" in row


def _tool(columns: Iterable[str]) -> str:
    known = set(columns)
    if {"energy_consumed", "project_name"} <= known:
        return "codecarbon"
    if known & {"experiment_id", "artifact_uri", "mlflow.runname", "lifecycle_stage"}:
        return "MLflow"
    return "Weights & Biases" if known & {"state", "_runtime", "sweep"} else "another tool"


def _arm(row: Row, path: Path) -> str:
    """Return the arm of a run: what it is called, without its seed."""
    named = _first(row, ARM)
    text = one_line(str(named)).strip() if named is not None else path.stem
    if "arm" in row:
        return text[:200] or path.stem
    return re.sub(r"[-_ ./]*(?:seed|run|s)[-_ =]*\d+$", "", text, flags=re.I)[:200] or path.stem


def _first(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _joules(row: Row, key: str, unit: float) -> float | None:
    value = _number(row.get(key))
    return value * unit if value is not None and 0 < value * unit < MOST_JOULES else None


def _number(value: Any) -> float | None:
    """Return a finite number of a cell; "1h 2m 3s" and text are none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e18 else None


def _is_share(name: str) -> bool:
    from greenvis.report.measures import SHARE, named

    return named(name).unit == SHARE


def _start(row: Row) -> float:
    """Return when a run began, in seconds since 1970; 0 where nothing says."""
    value = _first(row, START)
    number = _number(value)
    if number is not None:
        return max(0.0, number / 1000 if number > 1e11 else number)
    try:
        when = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return max(0.0, when.timestamp())
