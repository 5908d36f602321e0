"""`greenvis bench peers`: the same work done with greenvis and with what people use without it, in
turns in one process. Some ten minutes on one core.

Peers that are not installed are left out and named: `pip install 'greenvis[bench]'`. Replay beside
avalanche-lib has a benchmark of its own, `greenvis bench replay`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import statistics
import time
import warnings
from typing import Annotated, Any

import torch
import typer

from greenvis.bench import _floor, _output
from greenvis.bench._digits import TEST, TRAIN
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.bench.peers import _serving
from greenvis.bench.peers._work import Trained, Work
from greenvis.bench.peers._works import WORKS
from greenvis.errors import BadInput, nearest
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn

PEERS = ("peft", "transformers", "codecarbon", "lightning", "onnxruntime", "timm")
SERVING = "serving"
Only = Annotated[
    list[str] | None, typer.Option("--work", metavar="NAME", help="only these; may be repeated")
]


def run(
    out: Out = None, work: Only = None, rounds: Rounds = 3, threads: Threads = 1
) -> dict[str, Any]:
    """Return {"rows": [{"work", "arm", "cpu_s", "vs_peer", "accuracy", "lines", "target"}],
    "serving": [{"way", "cpu_ms_per_image", "vs_eager", "answers_apart"}], …}: medians over rounds,
    of the ratio to the first arm within a round.

    A training's CPU time is that of all of it: data, steps, evaluation and, in a recipe, records
    and the meter. Arms take turns, the order turning around every other round; each round is
    another seed, and one round before the first warms up. Raises BadInput for an unknown work.
    """
    names = [*WORKS, SERVING]
    chosen = work or names
    for name in chosen:
        if name not in names:
            raise BadInput(f"unknown work '{name}'{nearest(name, names)}")
    started = time.monotonic()
    with cpu_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        works = [WORKS[name]() for name in WORKS if name in chosen]
        rows = [row for one in works for row in _rows(one, _measured(one, rounds))]
        serving = (
            _serving.measured(_serving.ways(), 2 * rounds + 1, 640) if SERVING in chosen else []
        )
    result = {
        "rows": rows, "serving": serving, "works": {one.name: one.about for one in works},
        "images": [TRAIN, TEST], "rounds": rounds, "threads": threads,
        "machine": cpu(), "torch": torch.__version__, "versions": _versions(),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, str(out)))
    return result


def _versions() -> dict[str, str | None]:
    """Return the version of each peer; None of one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _measured(work: Work, rounds: int) -> dict[str, list[Trained]]:
    """Return each arm's trainings, one a round."""
    trained: dict[str, list[Trained]] = {arm.name: [] for arm in work.arms}
    for seed in range(rounds + 1):
        for arm in in_turn(work.arms, seed):
            gc.collect()  # or an arm pays for what another one left
            one = arm.train(seed)
            trained[arm.name] += [one] if seed else []
    return trained


def _rows(work: Work, trained: dict[str, list[Trained]]) -> list[dict[str, Any]]:
    peer = trained[work.arms[0].name]
    rows = []
    for arm in work.arms:
        own = trained[arm.name]
        ratio = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(own, peer, strict=True))
        rows.append(
            {
                "work": work.name,
                "arm": arm.name,
                "cpu_s": round(statistics.median(t.cpu_s for t in own), 2),
                "vs_peer": round(ratio, 3),
                "accuracy": round(100 * statistics.fmean(t.accuracy for t in own), 1),
                "lines": arm.lines,
                "target": (
                    f"<= {work.target:g}: {'yes' if ratio <= work.target else 'NO'}"
                    if arm.ours
                    else ""
                ),
            }
        )
    return rows


def _markdown(result: dict[str, Any], out: str) -> str:
    missed = [row for row in result["rows"] if row["target"].endswith("NO")]
    reached = [row for row in result["rows"] if row["target"].endswith("yes")]
    first = f"{len(reached)} of {len(missed) + len(reached)} targets are reached"
    if missed:
        first += "; not reached: " + ", ".join(
            f"{row['work']} (×{row['vs_peer']:.2f}, {row['target'].split(':')[0]})"
            for row in missed
        )
    peers = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    absent = [name for name, version in result["versions"].items() if not version]
    left_out = {*WORKS} - {*result["works"]}
    only = "".join(f" --work {name}" for name in result["works"]) if left_out else ""
    lines = [
        "# The same work with greenvis and with what people use without it", "", f"{first}.", "",
        f"`greenvis bench peers{only} --rounds {result['rounds']} --out {out}`, "
        f"{result['seconds']} s on {os.cpu_count()} logical CPUs, {result['threads']} thread(s), "
        f"torch {result['torch']}; {peers}."
        + (f" Not installed and left out: {', '.join(absent)}." if absent else "")
        + f" {result['images'][0]} of scikit-learn's digits to train on, {result['images'][1]} to "
        "test on; batches of 32, AdamW, a cosine. CPU time of the whole training, which of a "
        "recipe is the whole command: its records, evaluation, and what it measures of the "
        "finished model (latency, energy per image); medians over "
        f"{result['rounds']} rounds of another seed each; arms take turns, and vs_peer compares "
        "within a round. Where energy is estimated from CPU time, as on this machine, its ratio "
        "is the same. lines: of code, or of the recipe.", "",
        *(f"- **{name}**: {about}." for name, about in result["works"].items()), "",
        *_floor.table(result["rows"]),
    ]  # fmt: skip
    if result["serving"]:
        lines += [
            "", "## Serving", "",
            "EfficientNet-Lite0 at 64 pixels, batches of 64; ways take turns. answers_apart: the "
            "greatest difference of an answer from eager's, as a share of the greatest.", "",
            *_floor.table(result["serving"]),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
