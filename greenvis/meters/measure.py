"""What a finished model costs to serve, as facts for its run record."""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from greenvis.core.example import call
from greenvis.meters import flops, pricing, serving, speed
from greenvis.meters.devices import asynchronous, wait
from greenvis.meters.serving import median_spread
from greenvis.meters.track import Tracker
from greenvis.tasks.base import Task
from greenvis.tasks.classification import Classification

if TYPE_CHECKING:
    from torchmetrics import Metric

LOOK_S = 0.5  # seconds of inference for latency
# of one reading of throughput and energy; a GPU's counter moves about every tenth of a second
ROUND_S, GPU_ROUND_S = (0.1, 0.5)
STEADY = 0.03  # readings are repeated until their median's spread is no more,
LEAST, MOST_S = 5, 3.0  # so many at least, and for so many seconds at most
# passes over the images where settings of one model are compared, more while they are unsteady,
PASSES, PASSES_S = (3, 60.0)
# as far as they fit into so many seconds of a reading: no energy is told by it
UNCOUNTED = ("at_s", "samples", "steps", "flops", "steal_s")
# batches that a setting answers before the next one's turn, and some before they count
TURN, WARM = (16, 2)


def measure(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Return MACs, parameters, latency, throughput and what serving was observed to take
    (`serving.image` prices it).

    x: a batch (batch, C, H, W) as it is served. The model is measured in eval mode, as it is. Where
    it says what it calls again and again for an image (`repeated`: a module, what it is called
    with, how often), that is counted once.
    """
    x = x.to(next(model.parameters(), x).device)
    part: Any = getattr(model, "repeated", lambda x: None)(x[:1])
    network, shown, times = part or (model, x[:1], 1)
    count = flops.count(network, shown)
    macs, spread = round(count.macs * times), {}
    # it may do more for some images than for others
    if part is None and count.with_data:
        distribution = flops.distribution(model, [x])
        macs, spread = (
            distribution["mean"],
            {"macs_distribution": distribution}
            if distribution["min"] < distribution["max"]
            else {},
        )
    single = speed.latency(model, x[:1], seconds=LOOK_S)
    return {
        "macs": macs,
        **spread,
        "flops_counters": count.counters,
        "flops_unhandled": count.unhandled,
        "params": sum(p.numel() for p in model.parameters()),
        "latency_ms": {"p50": single["p50"], "p95": single["p95"], "batch_size": 1},
        **serve(model, x, run),
    }


def serve(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Serve batches until the readings are steady; return images per second and what each reading
    observed."""
    model.eval()
    seconds: list[float] = []  # an image
    rounds: list[dict[str, float]] = []  # what was observed
    waiting = asynchronous(model, x)
    with torch.inference_mode(), run.phase("serve"):
        call(model, x)
        wait(waiting)  # what was asked for before is not this round's
        look, end = GPU_ROUND_S if waiting else ROUND_S, time.perf_counter() + MOST_S
        while len(seconds) < LEAST or (
            _unsteady(seconds, rounds, run) and time.perf_counter() < end
        ):
            before, started, images = _seen(run), time.perf_counter(), 0
            while images == 0 or time.perf_counter() - started < look:
                call(model, x)
                images += len(x)
            wait(waiting)
            seconds.append((time.perf_counter() - started) / images)
            rounds.append(_since(before, run) | {"samples": images})
            run.add(samples=images)
    return {
        "images_per_s": 1 / statistics.median(seconds),
        "inference": {"batch_size": len(x), "rounds": rounds},
    }


def _unsteady(
    seconds: Sequence[float], rounds: Sequence[Mapping[str, float]], run: Tracker
) -> bool:
    served = serving.image({"rounds": rounds}, run.header["components"])
    return (median_spread(seconds) if served is None else served["spread"]) > STEADY


def _seen(run: Tracker) -> dict[str, float]:
    """Return what was observed so far, and when that is."""
    return run.observed() | {"at_s": time.monotonic()}


def _since(before: Mapping[str, float], run: Tracker) -> dict[str, float]:
    """Return what was observed since `_seen`, and from when to when."""
    now = _seen(run)
    observed = {q: v - before.get(q, 0.0) for q, v in now.items() if q not in UNCOUNTED}
    return observed | {"from_s": before["at_s"], "to_s": now["at_s"]}


def compare(
    points: Callable[[], Mapping[str, AbstractContextManager[dict[str, Any]]]],
    answer: Callable[[Any, Any], Any],
    batches: Callable[[], Iterable[Any]],
    run: Tracker,
    turn: int = TURN,
    task: Task | None = None,
) -> list[dict[str, Any]]:
    """Return what a model that can be switched reaches and costs at each setting: the task's
    metrics by name, observations, facts of its own.

    points: gives contexts by name, new ones at each call; each gives a mapping that holds facts of
    what was answered within: lists of counts, which add up, and numbers, means over images; and,
    under "answer", how it answers an iterator of images by one of logits, where that is not batch
    by batch. answer: images and labels to the outputs of the task, classification by default.
    batches: (x, y) to serve, and again in each pass; reading them is not counted. Settings take
    turns at every `turn` batches, in turned order at every other turn, so that a neighbour's load
    meets all alike. Each turn begins with fresh memory, which lies better or worse by chance, and
    two batches beforehand that are not counted. Passes are repeated until the ratio of energies to
    the first setting's is steady.
    "passes": what each observed (`serving.settings` prices them).
    """
    task = task or Classification()
    metrics: dict[str, dict[str, Metric]] = {}
    facts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    passes: dict[str, list[dict[str, float]]] = {}
    images, started = 0, time.perf_counter()
    while not passes or _again(passes, time.perf_counter() - started, run):
        number = len(next(iter(passes.values()), []))
        spent: dict[str, dict[str, float]] = {}
        for i, part in enumerate(_parts(batches(), turn)):
            size = sum(len(y) for _, y in part)
            contexts = [*points().items()]
            for name, point in contexts if (i + number) % 2 == 0 else contexts[::-1]:
                _give_memory_back()
                with points()[name] as stats, torch.inference_mode():
                    _answers(part[:WARM], stats, answer)
                with point as stats, torch.inference_mode(), run.phase("serve"):
                    before = _seen(run)
                    answers = _answers(part, stats, answer)
                    spent[name] = _summed(spent.get(name), _since(before, run))
                    run.add(samples=size)
                if not number:
                    for outputs, (_, y) in zip(answers, part, strict=True):
                        if name not in metrics:
                            metrics[name] = _metrics(task, outputs)
                        for metric in metrics[name].values():
                            metric.update(outputs, y)
                    facts.setdefault(name, []).append((size, stats))
            images += 0 if number else size
        for name, observed in spent.items():
            passes.setdefault(name, []).append(observed)
    return [
        {
            "setting": name,
            **{key: float(metric.compute()) for key, metric in metrics[name].items()},
            "images": images,
            "passes": passes[name],
        }
        | _together(facts[name])
        for name in [*points()]
    ]


def _summed(sums: Mapping[str, float] | None, more: Mapping[str, float]) -> dict[str, float]:
    """Return what was observed in both, from the first's beginning to the second's end."""
    if sums is None:
        return dict(more)
    return {q: v + sums.get(q, 0.0) for q, v in more.items()} | {
        "from_s": sums["from_s"],
        "to_s": more["to_s"],
    }


def _metrics(task: Task, outputs: Any) -> dict[str, Metric]:
    return task.metrics(0 if task.class_axis is None else outputs.shape[task.class_axis])


def _answers(
    part: Sequence[tuple[Any, Any]], stats: dict[str, Any], answer: Callable[[Any, Any], Any]
) -> list[Any]:
    """Answer these batches, as the setting that gave `stats` does, and return the answers, on the
    CPU."""
    own = stats.pop("answer", None)
    answers = (answer(x, y) for x, y in part) if own is None else own(x for x, _ in part)
    return [tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, a) for a in answers]


def _give_memory_back() -> None:
    """Have glibc return what is free, so that what follows works on other pages than what came
    before."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # type: ignore[union-attr]


def _parts(batches: Iterable[Any], turn: int) -> Iterator[list[tuple[Any, Tensor]]]:
    """Yield lists of so many batches (x, y)."""
    remaining = iter(batches)
    while part := [(x, y) for x, y, *_ in islice(remaining, turn)]:
        yield part


def _again(
    passes: Mapping[str, Sequence[Mapping[str, float]]], seconds: float, run: Tracker
) -> bool:
    """Say whether another pass is wanted, and likely to be over in time."""
    made = len(next(iter(passes.values())))
    spent = {
        name: [pricing.joules(p, run.header["components"]).value or 0.0 for p in own]
        for name, own in passes.items()
    }
    first, *rest = spent.values()
    unsteady = any(serving.steadiness(own, first).get("spread", math.inf) > STEADY for own in rest)
    return seconds * (made + 1) / made < PASSES_S and (made < PASSES or unsteady)


def _together(parts: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return one mapping for all: lists of counts added up, numbers averaged over images."""
    images = sum(n for n, _ in parts)
    return {
        key: [sum(c) for c in zip(*(stats[key] for _, stats in parts), strict=True)]
        if isinstance(value, list)
        else sum(n * stats[key] for n, stats in parts) / images
        for key, value in parts[0][1].items()
    }
