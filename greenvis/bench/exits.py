"""`greenvis bench exits`: samples that leave early against the unmodified model with its fused
attention. Minutes on one core.

Whether the answers stay right is not seen here (the weights are random): that is the reports of
recipes/exits. No other
implementation stands beside it: none that takes a model as it is was found on PyPI.
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
from torch import Tensor, nn

from greenvis.bench import _exiting, _floor, _output
from greenvis.bench._exiting import AT
from greenvis.bench._options import Images, Model, Out, Rounds, Threads
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import flops
from greenvis.meters.devices import asynchronous, wait
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker, track

MODEL = "timm/deit_tiny_patch16_224"
BATCHES = (1, 4, 16, 64)
# of those who come to an exit: how many leave there, at each of three
LEAVING = (0.0, 0.2, 0.4, 0.7, 1.0)
TARGET = 0.85  # of the MACs saved, at the largest batch: the energy saved
PLAIN, NEVER = "unmodified", "never"


def run(
    out: Out = None,
    model: Model = MODEL,
    batches: Sequence[int] = BATCHES,
    leaving: Sequence[float] = LEAVING,
    images: Images = 64,
    rounds: Rounds = 3,
    threads: Threads = 1,
) -> dict[str, Any]:
    """Return {"rows": [{"batch", "thresholds", "exits", "gmacs", "macs_ratio", "images_per_s",
    "speedup", "latency_p50_ms", "latency_p95_ms", "energy_j", "energy_ratio", "realised",
    "target"}], …}: one row for each batch size and setting.

    The same images are served at each batch size. Thresholds are those at which a share of the
    images that come to an exit leaves there. Settings take turns within each round, in turned order
    every other one, so that a neighbour's load meets all alike. speedup is of CPU time (on a GPU of
    wall time), a median over rounds; energy_j is per image; realised is the energy saved over the
    MACs saved. out: a folder to write report.md, results.json and figures/exits.svg to.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with cpu_threads(threads):
        plain, installed = _exiting.build_with_exits(model)
        x = _exiting.images(images, plain).to(device)
        plain.to(device)
        installed.exits.model.to(device)
        arms = {
            PLAIN: None,
            NEVER: [float("inf")] * len(AT),
            **_exiting.thresholds(installed, x, leaving),
        }
        macs = flops.count(plain, x[:1], cross_check=False).macs
        with (
            tempfile.TemporaryDirectory() as folder,
            track("exits", dir=folder, quiet=True) as tracker,
        ):
            rows = []
            for batch in batches:
                timings = _measured(plain, installed, arms, x, batch, rounds, tracker)
                rows += _rows(batch, arms, timings, macs, images, batch == max(batches))
    result = {
        "rows": rows, "model": model, "images": images, "rounds": rounds, "threads": threads,
        "device": device.type,
        "machine": cpu(), "torch": torch.__version__, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
        drawn = [row for row in rows if row["setting"] != PLAIN and row["energy_ratio"] is not None]
        _output.draw(
            out / "figures/exits.svg",
            drawn,
            ("macs_ratio", "MACs of an image / those of the unmodified model"),
            ("energy_ratio", "energy / its energy"),
            low=0,
        )
    return result


def _measured(
    plain: nn.Module,
    installed: Any,
    arms: dict[str, Any],
    x: Tensor,
    batch: int,
    rounds: int,
    run: Tracker,
) -> dict[str, dict[str, Any]]:
    """Return seconds by call, seconds and joules by round, and where the images left, by
    setting."""
    timings = {name: {"calls": [], "seconds": [], "joules": [], "left": None} for name in arms}
    parts = x.split(batch)
    with torch.inference_mode():
        plain(parts[0])
        for i in range(rounds):
            for name in in_turn(arms, i):
                if arms[name] is None:
                    _serve(plain, parts, timings[name], run)
                    continue
                with installed.at(arms[name]) as facts:
                    _serve(installed.exits.model, parts, timings[name], run)
                timings[name]["left"] = facts
    return timings


def _serve(
    model: nn.Module, parts: Sequence[Tensor], timings: dict[str, Any], run: Tracker
) -> None:
    waiting = asynchronous(model, parts[0])
    clock = time.perf_counter if waiting else time.process_time
    before, began = run.energy().value, clock()
    for part in parts:
        start = time.perf_counter()
        model(part)
        wait(waiting)
        timings["calls"].append(time.perf_counter() - start)
    timings["seconds"].append(clock() - began)
    after = run.energy().value
    timings["joules"].append(None if before is None or after is None else after - before)


def _rows(
    batch: int,
    arms: dict[str, Any],
    timings: dict[str, dict[str, Any]],
    macs: float,
    images: int,
    largest: bool,
) -> list[dict[str, Any]]:
    seconds = {name: statistics.median(f["seconds"]) for name, f in timings.items()}
    joules = {
        name: statistics.median(f["joules"]) if None not in f["joules"] else None
        for name, f in timings.items()
    }
    rows = []
    for name, f in timings.items():
        left = f["left"] or {"exits": [], "macs": macs}
        spent, plain, share = joules[name], joules[PLAIN], left["macs"] / macs
        energy = spent / plain if spent is not None and plain else None
        realised = (1 - energy) / (1 - share) if energy is not None and share < 0.95 else None
        calls = sorted(f["calls"])
        rows.append({
            "batch": batch, "setting": name,
            "thresholds": " ".join(f"{t:.4g}" for t in arms[name] or []),
            "exits": " ".join(str(n) for n in left["exits"]), "gmacs": round(left["macs"] / 1e9, 3),
            "macs_ratio": round(share, 3), "images_per_s": round(images / seconds[name], 2),
            "speedup": round(seconds[PLAIN] / seconds[name], 3), "latency_p50_ms": round(_at(calls,
            0.5) * 1e3, 1),
            "latency_p95_ms": round(_at(calls, 0.95) * 1e3, 1),
            "energy_j": None if spent is None else round(spent / images, 4),
            "energy_ratio": None if energy is None else round(energy, 3),
            "realised": None if realised is None else round(realised, 3),
            "target": f">= {TARGET:g}: {'yes' if realised >= TARGET else 'NO'}" if largest
            and realised is not None else "",
        })  # fmt: skip
    return rows


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _markdown(result: dict[str, Any], out: Path) -> str:
    rows = result["rows"]
    lines = [
        "# Early exit: throughput and energy against fused attention", "",
        f"`greenvis bench exits --out {out}`, {result['seconds']} s on {os.cpu_count()} logical "
        f"CPUs, {result['threads']} thread(s), {result['device']}, torch {result['torch']}. "
        f"`{result['model']}`, random weights (what leaving costs in accuracy stands in the "
        f"reports of recipes/exits), exits after {', '.join(f'{a:.0%}' for a in AT)} of the MACs. "
        f"The same {result['images']} images at each batch size; medians of {result['rounds']} "
        "rounds in which all settings take turns; CPU time, energy as `greenvis doctor` says. "
        "`exits` are the images that left at each, the last being the model's end; `realised` is "
        "the energy saved over the MACs saved.", "",
        *_floor.table(rows),
    ]  # fmt: skip
    apart = _floor.ratio(row["energy_ratio"] for row in rows if row["setting"] == NEVER)
    lines += [
        "",
        _floor.sentence(apart, "never, which lets nobody leave, and the unmodified model"),
    ]
    losses = [
        f"batch {r['batch']}, {r['setting']}"
        for r in rows
        if r["setting"] not in (PLAIN, NEVER) and r["speedup"] < 1
    ]
    lines += [
        "",
        f"Slower than the unmodified model: {'; '.join(losses) or 'none'}.",
        "",
        "![energy](figures/exits.svg)",
    ]
    lines += [
        "",
        "No other implementation that takes a model as it is was found on PyPI to stand beside it.",
    ]
    return "\n".join(lines) + "\n"
