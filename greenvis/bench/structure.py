"""`greenvis bench structure`: networks of another structure or fewer bits beside the plain ones, in
one table. Minutes on one core.

What a conversion costs in accuracy stands in the reports of recipes/structure: but for
EfficientNet-Lite0, weights are random, so that answers are compared where the structure is meant to
keep them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from greenvis.bench import _floor, _output
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.bench._structures import GROUPS, Arm, Arms, Group
from greenvis.core import files
from greenvis.errors import BadInput, nearest, some
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import flops
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker, track

CALLS_S = 0.2  # seconds of one reading at batch 1, at least


def run(
    out: Out = None,
    groups: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="NAME", help="only these; may be repeated"),
    ] = None,
    rounds: Rounds = 5,
    threads: Threads = 1,
    side: Annotated[int | None, typer.Option(min=32, help="in the place of each one's")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="in the place of each one's")] = None,
) -> dict[str, Any]:
    """Return {"rows": [{"network", "setting", "gmacs", "MB", "latency_ms", "batch", "rounds",
    "batch_ms", "time_ratio", "energy_j", "energy_ratio", "agreement", "difference"}], …}.

    Settings of a network take turns within each round, in turned order every other one. Times are
    of CPU time, medians over rounds, ratios medians of each round's own; energy_j is per image of
    the larger batch. agreement: how many of 64 crops of two photographs get the first setting's
    class; difference: the largest of an answer, as a share of the largest answer.

    Args:
        out: A folder to write report.md and results.json to. Networks measured into it before, on
            this machine and in as many rounds, stay in the table.
        groups: Names of networks; all without.
        rounds: In which the settings take turns.
        threads: Of torch.
        side: Of an image in pixels, in the place of each network's own.
        batch: In the place of each network's own.

    Raises:
        BadInput: For an unknown network.
    """
    started, rows = time.monotonic(), []
    names = [g.name for g in GROUPS]
    for name in groups or ():
        if name not in names:
            raise BadInput(f"unknown network '{name}'{nearest(name, names)}; known: {some(names)}")
    with (
        cpu_threads(threads),
        tempfile.TemporaryDirectory() as folder,
        track("structure", dir=folder, quiet=True) as run_,
    ):
        for group in GROUPS:
            if not groups or group.name in groups:
                rows += _rows(group, rounds, run_, side or group.side, batch or group.batch)
    result = {
        "rows": rows, "rounds": rounds, "threads": threads, "machine": cpu(),
        "torch": torch.__version__, "repeatability": _floor.repeatability(),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _add_earlier(result, out / "results.json")
        _output.write(out, result, _markdown(result, out))
    return result


def _add_earlier(result: dict[str, Any], file: Path) -> None:
    """Put rows of other networks beside those of this run, in the order of `GROUPS`."""
    if not file.exists():
        return
    earlier = files.read_json(file, "benchmark")
    if any(earlier.get(k) != result[k] for k in ("rounds", "threads", "machine", "torch")):
        return
    order = [g.name for g in GROUPS]
    new = {row["network"] for row in result["rows"]}
    rows = [row for row in earlier["rows"] if row["network"] in {*order} - new]
    result["rows"] = sorted(rows + result["rows"], key=lambda row: order.index(row["network"]))
    result["seconds"] += earlier["seconds"]


def _rows(
    group: Group, rounds: int, run_: Tracker, side: int, batch: int
) -> Iterator[dict[str, Any]]:
    arms = group.arms(side)
    x = photographs(64, side)
    first = next(iter(arms))
    keep = [name for name, arm in arms.items() if arm.keeps]
    answers = {name: _answers(arms[name], x) for name in ([first, *keep] if keep else ())}
    single = _measured(arms, x[:1], rounds, None)
    x_many = x.repeat(-(-batch // 64), 1, 1, 1)[:batch]
    many = _measured(arms, x_many, rounds * group.turns, run_)
    for name, arm in arms.items():
        seconds = statistics.median(s for s, _ in many[name])
        pairs = list(zip(many[first], many[name], strict=True))
        joules = [j for _, j in many[name] if j is not None]
        shares = [b / a for (_, a), (_, b) in pairs if a and b is not None]
        row: dict[str, Any] = {
            "network": group.name, "setting": name,
            "gmacs": round(flops.count(arm.model, x[:1], cross_check=False).macs / 1e9, 3),
            "MB": round(_megabytes(arm), 1),
            "latency_ms": round(statistics.median(s for s, _ in single[name]) * 1e3, 1),
            "batch": batch, "rounds": len(pairs), "batch_ms": round(seconds * 1e3, 1),
            "time_ratio": round(statistics.median(b / a for (a, _), (b, _) in pairs), 3),
            "energy_j": round(statistics.median(joules) / batch, 5)
            if len(joules) == len(pairs) else None,
            "energy_ratio": round(statistics.median(shares), 3) if shares else None,
        }  # fmt: skip
        if arm.keeps:
            same, wanted = answers[name], answers[first]
            row["agreement"] = round(float((same.argmax(1) == wanted.argmax(1)).float().mean()), 3)
            row["difference"] = float(f"{(same - wanted).abs().max() / wanted.abs().max():.2g}")
        yield row


@contextmanager
def _serving(arm: Arm, x: Tensor) -> Iterator[Tensor]:
    shown = x.to(memory_format=torch.channels_last) if arm.last else x
    with arm.within(), torch.inference_mode():
        yield shown


def _answers(arm: Arm, x: Tensor) -> Tensor:
    with _serving(arm, x) as shown:
        return torch.cat([arm.model(part).float() for part in shown.split(16)])


def _measured(
    arms: Arms, x: Tensor, rounds: int, run_: Tracker | None
) -> dict[str, list[tuple[float, float | None]]]:
    """Return CPU seconds of a batch, and joules where they are asked for, by arm and round."""
    readings: dict[str, list[tuple[float, float | None]]] = {name: [] for name in arms}
    for i in range(rounds + 1):  # the first warms up
        for name in in_turn(arms, i):
            with _serving(arms[name], x) as shown:
                energy = None if run_ is None else run_.energy().value
                start, calls = time.process_time(), 0
                while calls == 0 or (len(x) == 1 and time.process_time() - start < CALLS_S):
                    arms[name].model(shown)
                    calls += 1
                seconds = (time.process_time() - start) / calls
                after = None if run_ is None else run_.energy().value
            joules = None if energy is None or after is None else (after - energy) / calls
            if i:
                readings[name].append((seconds, joules))
    return readings


def _megabytes(arm: Arm) -> float:
    """Return the size of what is served: bf16 halves it, int8 packs rows beside their scales."""
    with arm.within():
        state = {id(t): t for t in (*arm.model.parameters(), *arm.model.buffers())}
        size = sum(t.numel() * t.element_size() for t in state.values())
        packed = [m for m in arm.model.modules() if hasattr(vars(m).get("forward"), "packed")]
        for module in packed:
            size -= 3 * module.weight.numel()  # type: ignore[operator, union-attr]
    return size / 1e6


def photographs(count: int, side: int) -> Tensor:
    """Return crops of scikit-learn's two photographs.

    Args:
        count: How many.
        side: In pixels.

    Returns:
        (count, 3, side, side), about -1 to 1.
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        image = torch.from_numpy(load_sample_images().images[i % 2].copy()).permute(2, 0, 1)
        size = int(torch.randint(120, 400, (), generator=generator))
        top = int(torch.randint(0, image.shape[1] - size, (), generator=generator))
        left = int(torch.randint(0, image.shape[2] - size, (), generator=generator))
        crop = image[None, :, top : top + size, left : left + size].float() / 127.5 - 1
        crops.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True)[0])
    return torch.stack(crops)


def _markdown(result: dict[str, Any], out: Path) -> str:
    rows: Sequence[dict[str, Any]] = result["rows"]
    losses = [f"{r['network']}: {r['setting']}" for r in rows if r["time_ratio"] > 1.02]
    lines = [
        "# Cheaper structures beside the plain networks", "",
        f"`greenvis bench structure --rounds {result['rounds']} --out {out}` (`--group` measures "
        f"one network at a time into it), {result['seconds']} s on {os.cpu_count()} logical CPUs, "
        f"{result['threads']} thread(s), torch {result['torch']}. Random weights but "
        "for EfficientNet-Lite0; `agreement` and `difference` are of settings that are meant to "
        "answer as the first does, on crops of two photographs. What a conversion costs in "
        "accuracy after training stands in the reports of recipes/structure. "
        "Medians of `rounds` in which the settings of a network take turns, "
        "ratios to the first setting of what ran in the same round; CPU time, energy as `greenvis "
        "doctor` says, per image of the larger batch; latency at batch 1, over "
        f"{result['rounds']}. A network with its own "
        "branches folded costs what a plain network of the same layers costs.", "",
        *_floor.table(rows), "",
        f"Dearer than the first setting: {'; '.join(losses) or 'none'}.", "",
        _floor.sentence(None, repeatability=result["repeatability"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
