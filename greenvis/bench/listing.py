"""`greenvis bench listing`: how long `greenvis ls` and `greenvis report` take over ten thousand
records. A minute or two."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from greenvis.bench import _floor, _output
from greenvis.bench._options import Out
from greenvis.meters.record_writer import Writer

ARMS, SEEDS = 2500, 4
EPOCHS = (5, 22)  # 26 and 94 lines a record; a recipe's own have about a hundred
TARGETS = {"ls": 5.0, "ls again": 3.0, "report": 20.0}  # seconds
MOST_MB = 1000.0


def run(out: Out = None) -> dict[str, Any]:
    """Return {"rows": [{"command", "lines", "wall_s", "cpu_s", "memory_mb", "target", "met"}]},
    each in a process of its own.

    out: a folder to write report.md and results.json to.
    """
    rows = []
    for epochs in EPOCHS:
        with tempfile.TemporaryDirectory() as folder:
            lines = _write(Path(folder) / "runs", epochs)
            for verb, words in (
                ("ls", ["ls", "runs", "--json"]),
                ("ls again", ["ls", "runs", "--json"]),
                ("report", ["report", "runs", "--out", "out"]),
            ):
                rows.append(
                    {
                        "command": verb,
                        "records": ARMS * SEEDS,
                        "lines": lines,
                        **_timed(words, folder, TARGETS[verb]),
                    }
                )
    result = {"rows": rows}
    if out is not None:
        machine = (
            f"`greenvis bench listing --out {out}`, {os.cpu_count()} logical CPUs; `lines` are "
            "those of each record."
        )
        lines = ["# Many runs at once", "", machine, "", *_floor.table(rows), ""]
        _output.write(out, result, "\n".join(lines))
    return result


def _timed(words: list[str], folder: str, target_s: float) -> dict[str, Any]:
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "greenvis", *words],
        cwd=folder,
        env=os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"},  # the first list finds no index
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s, memory_mb = time.monotonic() - started, usage.ru_maxrss * 1024 / 1e6
    met = process.returncode == 0 and wall_s < target_s and memory_mb < MOST_MB
    return {
        "wall_s": round(wall_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "memory_mb": round(memory_mb),
        "target": f"< {target_s:g} s, < {MOST_MB:g} MB",
        "met": "yes" if met else "no",
    }


def _write(folder: Path, epochs: int) -> int:
    """Write the records; return how many lines each has."""
    rng = random.Random(0)
    watts = {"low": 2.9, "central": 4.0, "high": 5.8}
    component = {
        "name": "cpu",
        "source": "cpu-time model",
        "scope": "process",
        "observation": "cpu_s",
        "coefficient": watts,
    }
    lines = 0
    for arm in range(ARMS):
        for seed in range(SEEDS):
            name, run_id = f"arm{arm}", f"{arm:06x}-{seed}"
            header = {
                "run": run_id, "name": "many", "arm": name, "seed": seed, "inputs": name,
                "attempt": 1,
                "rank": 0, "world_size": 1, "host": "h", "boot_id": "b", "clock_s": 1.0 * arm,
                "baseline": "arm0",
                "components": [{**component, "provenance": "estimated"}],
                "carbon_intensity": {"value": 475.0, "zone": "world"},
            }  # fmt: skip
            writer = Writer(folder / name / f"seed{seed}" / f"{run_id}.rank0.jsonl", header)
            spent = 0.0
            for epoch in range(epochs):
                spent += rng.uniform(0.8, 1.2)
                for phase, share in ((f"train/epoch{epoch + 1}", 1.0), ("eval", 0.2), ("", 0.01)):
                    writer.line(
                        "sample",
                        {
                            "phase": phase,
                            "wall_s": spent * share,
                            "cpu_s": spent * share,
                            "samples": 1e4,
                        },
                    )
                writer.line(
                    "log",
                    {"phase": "eval", "epoch": epoch + 1, "accuracy": 0.5 + 0.3 * rng.random()},
                )
            writer.line(
                "fact", {"accuracy": 0.8 + 0.1 * rng.random(), "macs": 1e9, "params": 5_700_000}
            )
            writer.close("done")
            lines = lines or writer.path.read_bytes().count(b"\n")
    return lines
