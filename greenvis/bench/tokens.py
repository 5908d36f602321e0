"""`greenvis bench tokens`: merging tokens against the unmodified model with its fused attention.
Minutes on one core.

No other implementation stands beside it: that of the paper is not on PyPI, is for non-commercial
use, and replaces fused attention; no package of it for classifiers was found there. timm's
`patch_drop_rate` drops tokens at random, in training alone.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from greenvis import models
from greenvis.bench import _floor, _output
from greenvis.bench._options import Model, Out, Rounds, Threads
from greenvis.bench._turns import measured
from greenvis.core.wrap import wrap
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import flops
from greenvis.meters.header import cpu
from greenvis.meters.track import track
from greenvis.models.structure import example_input
from greenvis.techniques import registry

MODEL = "timm/deit_small_patch16_224"
SCHEDULES: tuple[Any, ...] = (0, 8, 13, 16, (13, -1))
BATCHES = (1, 4, 16, 32, 64)
TARGETS = {"8": 1.25, "13": 1.5}  # times the throughput of the unmodified model, at batch 16 and 32
PLAIN = "unmodified"


def run(
    out: Out = None,
    model: Model = MODEL,
    schedules: Sequence[Any] = SCHEDULES,
    batches: Sequence[int] = BATCHES,
    rounds: Rounds = 9,
    threads: Threads = 1,
) -> dict[str, Any]:
    """Return {"rows": [{"batch", "r", "gmacs", "flops_ratio", "images_per_s", "speedup",
    "realised", "latency_ms", "energy_j", "energy_ratio", "target"}], …}: one row for each batch
    size and r, random weights.

    Settings take turns within each round and the order turns around every other round, so that a
    neighbour's load meets all alike. images_per_s and latency_ms are of CPU time (on a GPU of wall
    time), medians over rounds; speedup and energy_ratio are medians of each round's own ratio;
    energy_j is per image; realised is speedup over flops_ratio. out: a folder to write report.md,
    results.json and figures/tokens.svg to.
    """
    started = time.monotonic()
    with cpu_threads(threads):
        arms = {PLAIN: models.build(model).eval()}
        for r in schedules:
            arms[_name(r)] = models.build(model).eval()
            wrap(
                arms[_name(r)],
                registry.find("token_merge").model_validate(
                    {"r": list(r) if isinstance(r, tuple) else r}
                ),
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        size = example_input(arms[PLAIN]).shape[1:]
        macs = {
            name: flops.count(arm, torch.rand(1, *size), cross_check=False).macs
            for name, arm in arms.items()
        }
        with (
            tempfile.TemporaryDirectory() as folder,
            track("tokens", dir=folder, quiet=True) as run_,
        ):
            rows = []
            for batch in batches:
                rows += _rows(
                    batch, measured(arms, torch.rand(batch, *size), device, rounds, run_), macs
                )
    result = {
        "rows": rows, "model": model, "rounds": rounds, "threads": threads, "device": device.type,
        "machine": cpu(),
        "torch": torch.__version__, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
        drawn = [row for row in rows if row["r"] != PLAIN]
        _output.draw(
            out / "figures/tokens.svg",
            drawn,
            ("flops_ratio", "FLOPs of the unmodified model / FLOPs"),
            ("speedup", "times its throughput"),
            low=1,
        )
    return result


def _name(r: Any) -> str:
    return str(r) if isinstance(r, int) else f"({r[0]}, {r[1]:+d})"


def _rows(
    batch: int, timings: dict[str, list[tuple[float, float | None]]], macs: dict[str, int]
) -> list[dict[str, Any]]:
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in timings.items()}
    joules: dict[str, float | None] = {}
    for name, runs in timings.items():
        known = [j for _, j in runs if j is not None]
        joules[name] = (
            round(statistics.median(known) / batch, 4) if len(known) == len(runs) else None
        )
    rows = []
    for name in timings:
        # of one round: what else the machine did met both alike
        rounds = list(zip(timings[PLAIN], timings[name], strict=True))
        ratio = macs[PLAIN] / macs[name]
        faster = statistics.median(plain / own for (plain, _), (own, _) in rounds)
        shares = [own / plain for (_, plain), (_, own) in rounds if own is not None and plain]
        target = TARGETS.get(name) if batch in (16, 32) else None
        rows.append({
            "batch": batch, "r": name, "gmacs": round(macs[name] / 1e9, 2),
            "flops_ratio": round(ratio, 3),
            "images_per_s": round(batch / seconds[name], 2), "speedup": round(faster, 3),
            "realised": round(faster / ratio, 3),
            "latency_ms": round(seconds[name] * 1e3, 1), "energy_j": joules[name],
            "energy_ratio": round(statistics.median(shares),
            3) if len(shares) == len(rounds) else None,
            "target": "" if target is None else f">= {target:g}: "
                                                f"{'yes' if faster >= target else 'NO'}",
        })  # fmt: skip
    return rows


def _markdown(result: dict[str, Any], out: Path) -> str:
    rows = result["rows"]
    lines = [
        "# Token merging: throughput and energy against fused attention", "",
        f"`greenvis bench tokens --out {out}`, {result['seconds']} s on {os.cpu_count()} logical "
        f"CPUs, {result['threads']} thread(s), {result['device']}, torch {result['torch']}. "
        f"`{result['model']}`, random weights (what merging costs in accuracy stands in the "
        f"reports of recipes/tokens). Medians of {result['rounds']} rounds in which all settings "
        "take turns, ratios of what ran in the same round; CPU time, energy as `greenvis doctor` "
        "says. `realised` is the speed-up over the ratio of FLOPs; `energy_ratio` below 1 is a "
        "saving.", "",
        *_floor.table(rows),
    ]  # fmt: skip
    apart = _floor.ratio(row["energy_ratio"] for row in rows if row["r"] == "0")
    lines += ["", _floor.sentence(apart, "r 0, which merges nothing, and the unmodified model")]
    losses = [
        f"batch {row['batch']}, r {row['r']}"
        for row in rows
        if row["r"] not in (PLAIN, "0") and row["speedup"] < 1
    ]
    lines += [
        "",
        f"Slower than the unmodified model: {'; '.join(losses) or 'none'}.",
        "",
        "![speed-up](figures/tokens.svg)",
    ]
    lines += [
        "",
        "No other implementation for image classifiers was found on PyPI to stand beside it.",
    ]
    return "\n".join(lines) + "\n"
