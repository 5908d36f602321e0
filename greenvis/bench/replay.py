"""`greenvis bench replay`: a training step with a replay buffer, beside that of avalanche-lib. Five
minutes on one core.

avalanche-lib is no part of greenvis: `pip install 'greenvis[bench]'`, or into a second environment
that shares nothing with it.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from greenvis import models
from greenvis.bench import _floor, _output
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.techniques import registry

PEER = "avalanche-lib"
INSTALL = (
    f"{PEER} stands beside greenvis in this benchmark and is not installed: pip install "
    "'greenvis[bench]'"
)
BUFFER, BATCH = 500, 32  # kept; new, and replayed, a step
SHAPE = (1, 28, 28)
# reference, options, images of a task (12,000: one of Split Fashion-MNIST)
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": ("plain/mlp", {"img_size": 28}, 12_000),
    "vit": (
        "timm/vit_tiny_patch16_224",
        {
            "img_size": 28,
            "patch_size": 7,
            "embed_dim": 96,
            "depth": 6,
            "num_heads": 3,
            "in_chans": 1,
            "num_classes": 10,
        },
        640,
    ),
}
TARGET = 0.5  # of the peer's time a step, on the model of continual learning's small tables
PEER_ARM, OURS, EXACT = "avalanche-lib", "greenvis", "greenvis, exact"
BARE = "no replay, 64 new images"
LOADED = "greenvis, torch's DataLoader"


def run(out: Out = None, rounds: Rounds = 15, threads: Threads = 1) -> dict[str, Any]:
    """Return {"rows": [{"model", "arm", "step_ms", "vs_peer", "without_the_model_ms", "target"}],
    …}: medians over rounds, of the ratio to the peer within a round.

    A step is the training on a task by its steps, all in: loading, replay, forward, backward, SGD,
    what is kept for the next task; CPU time, so that a neighbour's load is not counted. Arms take
    turns within each round, the order turning around every other round; each begins anew, fills its
    buffer with one task, and is timed on a second. out: a folder to write report.md and
    results.json to. Raises BadInput without the peer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("avalanche")
    except ImportError as error:
        raise BadInput(INSTALL) from error
    started = time.monotonic()
    with cpu_threads(threads):
        rows = [row for name in MODELS for row in _rows(name, _measured(name, rounds))]
    result = {
        "rows": rows, "buffer": BUFFER, "batch": [BATCH, BATCH], "rounds": rounds,
        "threads": threads,
        "machine": cpu(), "torch": torch.__version__,
        PEER: importlib.import_module("avalanche").__version__,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
    return result


def _measured(name: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step in each round, by arm."""
    images = MODELS[name][2]
    first, second = _task(images, 0), _task(images, 1)
    arms: dict[str, Callable[[], float]] = {
        PEER_ARM: lambda: _peer(_model(name), first, second),
        OURS: lambda: _ours(_model(name), first, second, _slices),
        EXACT: lambda: _ours(_model(name), first, second, _slices, exact=True),
        LOADED: lambda: _ours(_model(name), first, second, _loaded),
        BARE: lambda: _bare(_model(name), _task(2 * images, 1)),
    }
    timings: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(rounds + 1):
        for arm in in_turn(arms, i):
            gc.collect()  # or an arm pays for what another one left
            seconds = arms[arm]()
            timings[arm] += [seconds] if i else []  # the first round warms up
    return timings


def _model(name: str) -> nn.Module:
    ref, options, _ = MODELS[name]
    torch.manual_seed(0)
    return models.build(ref, **options)


def _task(count: int, number: int) -> tuple[Tensor, Tensor]:
    """Return images of two classes: noise takes as long as anything."""
    draw = torch.Generator().manual_seed(number)
    return torch.rand(count, *SHAPE, generator=draw), torch.randint(
        2, (count,), generator=draw
    ) + 2 * number


def _slices(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches as `greenvis.data` does, indexed at once."""
    for rows in torch.randperm(len(y)).split(size):
        yield x.index_select(0, rows), y[rows]


def _loaded(x: Tensor, y: Tensor, size: int) -> Iterator[Any]:
    yield from DataLoader(TensorDataset(x, y), size, shuffle=True)


def _ours(
    model: nn.Module,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    load: Callable[..., Iterator[Any]],
    exact: bool = False,
) -> float:
    """Train with greenvis in a plain loop and return the seconds of a step on the second task."""
    live = wrap(
        model.train(),
        registry.find("replay").model_validate(
            {"size": BUFFER, "batch_size": BATCH, "exact": exact}
        ),
    )
    optimizer = torch.optim.SGD(live.param_groups(0.01), lr=0.01)
    criterion = live.criterion(F.cross_entropy)

    def train(task: tuple[Tensor, Tensor]) -> None:
        for x, y in load(*task, BATCH):
            x, y = live.batch(x, y)
            logits = model(x)
            loss = criterion(logits, y) + live.loss(x, y, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            live.step_end()

    train(first)
    return _timed(lambda: train(second)) / math.ceil(len(second[1]) / BATCH)


def _bare(model: nn.Module, task: tuple[Tensor, Tensor]) -> float:
    """Train on as many images a step, all of them new: what no strategy can save."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)

    def train() -> None:
        for x, y in _slices(*task, 2 * BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return _timed(train) / math.ceil(len(task[1]) / (2 * BATCH))


def _peer(model: nn.Module, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Train with the peer's own strategy and loader, without its metrics and loggers."""
    benchmarks = importlib.import_module("avalanche.benchmarks")
    plugins = importlib.import_module("avalanche.training.plugins")
    supervised = importlib.import_module("avalanche.training.supervised")
    stream = benchmarks.tensors_benchmark(
        train_tensors=[first, second], test_tensors=[first], task_labels=[0, 0]
    ).train_stream
    strategy = supervised.Replay(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        criterion=nn.CrossEntropyLoss(),
        mem_size=BUFFER, train_mb_size=BATCH, train_epochs=1, device="cpu",
        evaluator=plugins.EvaluationPlugin(loggers=[]),
    )  # fmt: skip
    before, after = stream
    strategy.train(before)
    return _timed(lambda: strategy.train(after)) / math.ceil(len(second[1]) / BATCH)


def _timed(train: Callable[[], Any]) -> float:
    start = time.process_time()
    train()
    return time.process_time() - start


def _rows(model: str, timings: dict[str, list[float]]) -> list[dict[str, Any]]:
    medians = {arm: statistics.median(seconds) for arm, seconds in timings.items()}
    rows = []
    for arm, seconds in timings.items():
        ratio = statistics.median(
            own / peer for own, peer in zip(seconds, timings[PEER_ARM], strict=True)
        )
        judged = model == "mlp" and arm in (OURS, EXACT, LOADED)
        rows.append({
            "model": model, "arm": arm, "step_ms": round(1e3 * medians[arm], 3),
            "vs_peer": round(ratio, 3),
            "without_the_model_ms": round(1e3 * (medians[arm] - medians[BARE]), 3),
            "target": f"<= {TARGET:g}: {'yes' if ratio <= TARGET else 'NO'}" if judged else "",
        })  # fmt: skip
    return rows


def _markdown(result: dict[str, Any], out: Path) -> str:
    counts = " and ".join(f"{images} ({name})" for name, (_, _, images) in MODELS.items())
    lines = [
        "# A training step with a replay buffer, beside avalanche-lib", "",
        f"`greenvis bench replay --out {out}`, {result['seconds']} s on {os.cpu_count()} logical "
        f"CPUs, {result['threads']} thread(s), torch {result['torch']}, avalanche-lib "
        f"{result[PEER]}. ER with a buffer of {BUFFER}, {BATCH} new and {BATCH} replayed images a "
        f"step, SGD. The CPU time of training on a task of {counts} images, divided by its steps: "
        "loading, replay, forward, backward, optimizer, and what the buffer keeps (greenvis at "
        f"each step, avalanche-lib at the task's end). Medians over {result['rounds']} rounds; "
        "arms take turns in each, and vs_peer compares within a round. greenvis keeps images as "
        "bytes, or float32 (exact); avalanche-lib keeps which images of the data set in memory "
        "they are.", "",
        *_floor.table(result["rows"]),
        "", "`without_the_model_ms` is the step less that of the same model on 64 new images, what "
            "no strategy can save. On a "
        "larger model that part is nearly all, so the two come close: the target is judged on the "
        "multi-layer perceptron of "
        "recipes/continual/split-fashion.yaml.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
