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
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.meters import flops, speed
from greenvis.meters.devices import asynchronous, wait
from greenvis.meters.track import Tracker
from greenvis.record import Reading

LOOK_S = 0.5  # seconds of inference for latency
ROUND_S, GPU_ROUND_S = 0.1, 0.5  # of one reading of throughput and energy; a GPU's counter moves about every tenth of a second
STEADY = 0.03  # readings are repeated until their median's spread is no more,
LEAST, MOST_S = 5, 3.0  # so many at least, and for so many seconds at most
PASSES, PASSES_S = 3, 60.0  # passes over the images where settings of one model are compared, more while they are unsteady,
# as far as they fit into so many seconds
TURN, WARM = 16, 2  # batches that a setting answers before the next one's turn, and some before they count


def measure(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Return MACs, parameters, latency, throughput and energy of one image (joules), with their spread and repetitions.

    x: a batch (batch, C, H, W) as it is served. The model is measured in eval mode, as it is.
    """
    count = flops.count(model, x[:1])
    macs, spread = count.macs, {}
    if any(note.startswith(flops.WITH_DATA) for note in count.notes):  # it may do more for some images than for others
        found = flops.distribution(model, x)
        macs, spread = found["mean"], {"macs_distribution": found} if found["min"] < found["max"] else {}
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


def median_spread(values: Sequence[float]) -> float:
    """Return how far a median of these positive readings is off by chance, as a share of it: quartile range ÷ √count.

    That is about its standard error, and one reading that a neighbour on the machine disturbed does not move it. Infinite
    for fewer than two.
    """
    if len(values) < 2:
        return math.inf
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / math.sqrt(len(values)) / middle if middle else 0.0


def serve(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Serve batches until the readings are steady; return images per second and the energy of one image by the run's meter."""
    model.eval()
    seconds: list[float] = []  # an image
    joules: list[tuple[float, float, float] | None] = []  # an image: central, low, high
    waiting = asynchronous(model, x)
    with torch.inference_mode(), run.phase("serve"):
        model(x)
        wait(waiting)  # what was asked for before is not this round's
        look, end = GPU_ROUND_S if waiting else ROUND_S, time.perf_counter() + MOST_S
        while len(seconds) < LEAST or (_unsteady(seconds, joules) and time.perf_counter() < end):
            before, started, images = run.energy(), time.perf_counter(), 0
            while images == 0 or time.perf_counter() - started < look:
                model(x)
                images += len(x)
            wait(waiting)
            seconds.append((time.perf_counter() - started) / images)
            joules.append(_spent(before, run.energy(), images))
            run.add(samples=images)
    out: dict[str, Any] = {"images_per_s": 1 / statistics.median(seconds)}
    known = [j for j in joules if j is not None]
    value, low, high = sorted(known)[len(known) // 2] if known else (0.0, 0.0, 0.0)
    if len(known) == len(joules) and value > 0:  # a counter that stands still in most rounds steps too rarely for them
        out["inference_energy_j"] = {
            "value": value, "low": low, "high": high, "provenance": run.energy().provenance, "batch_size": len(x),
            "spread": median_spread([j[0] for j in known]), "rounds": len(known),
        }  # fmt: skip
    return out


def _unsteady(seconds: Sequence[float], joules: Sequence[tuple[float, float, float] | None]) -> bool:
    return median_spread([s if j is None else j[0] for s, j in zip(seconds, joules, strict=True)]) > STEADY


def _spent(before: Reading, after: Reading, images: int = 1) -> tuple[float, float, float] | None:
    """Return the joules between two readings, central, low and high, by image; None where the meter does not know."""
    if before.value is None or after.value is None:
        return None
    low, high = ((getattr(after, key) or 0.0) - (getattr(before, key) or 0.0) for key in ("low", "high"))
    return (after.value - before.value) / images, low / images, high / images


def compare(
    points: Callable[[], Mapping[str, AbstractContextManager[dict[str, Any]]]],
    answer: Callable[[Any], Tensor],
    batches: Callable[[], Iterable[Any]],
    run: Tracker,
    turn: int = TURN,
) -> list[dict[str, Any]]:
    """Return what a model that can be switched reaches and costs at each setting: accuracy, joules an image, facts of its own.

    points: gives contexts by name, new ones at each call; each gives a mapping that holds facts of what was answered within:
    lists of counts, which add up, and numbers, means over images; and, under "answer", how it answers an iterator of images by
    one of logits, where that is not batch by batch. answer: images to logits. batches: (x, y) to serve, and again in each
    pass; reading them is not counted. Settings take turns at every `turn` batches, in turned order at every other turn, so that
    a neighbour's load meets all alike. Each turn begins with fresh memory, which lies better or worse by chance, and two
    batches beforehand that are not counted. Passes are repeated until the ratio of energies to the first setting's is steady;
    joules are the median pass's. "spread": of that ratio, a share.
    """
    rights: dict[str, int] = {}
    facts: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    passes: list[dict[str, list[float]]] = []
    images, known, started = 0, True, time.perf_counter()
    while len(passes) < 1 or _again(passes, time.perf_counter() - started):
        spent: dict[str, list[float]] = {}
        for i, part in enumerate(_parts(batches(), turn)):
            size = sum(len(y) for _, y in part)
            contexts = [*points().items()]
            for name, point in contexts if (i + len(passes)) % 2 == 0 else contexts[::-1]:
                _give_memory_back()
                with points()[name] as told, torch.inference_mode():
                    _hits(part[:WARM], told, answer)
                with point as told, torch.inference_mode(), run.phase("serve"):
                    before = run.energy()
                    hits = _hits(part, told, answer)
                    joules = _spent(before, run.energy())
                    run.add(samples=size)
                known &= joules is not None
                spent[name] = [a + b for a, b in zip(spent.get(name, (0.0,) * 3), joules or (0.0,) * 3, strict=True)]
                if not passes:
                    rights[name] = rights.get(name, 0) + hits
                    facts.setdefault(name, []).append((size, told))
            images += 0 if passes else size
        passes.append(spent)
    rows = []
    for name in [*points()]:
        value, low, high = sorted(p[name] for p in passes)[len(passes) // 2]
        joules = {"value": value / images, "low": low / images, "high": high / images} | _steadiness(passes, name)
        row = {"setting": name, "accuracy": rights[name] / images, "inference_energy_j": joules if known else None}
        rows.append(row | {"images": images} | _together(facts[name]))
    return rows


def _hits(part: Sequence[tuple[Any, Tensor]], told: dict[str, Any], answer: Callable[[Any], Tensor]) -> int:
    """Answer these batches, as the setting that gave `told` does, and return how many answers are right."""
    own, given = told.pop("answer", None), (x for x, _ in part)
    answers = map(answer, given) if own is None else own(given)
    return sum(int((a.argmax(-1).cpu() == y).sum()) for a, (_, y) in zip(answers, part, strict=True))


def _give_memory_back() -> None:
    """Have glibc return what is free, so that what follows works on other pages than what came before."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # type: ignore[union-attr]


def _parts(batches: Iterable[Any], turn: int) -> Iterator[list[tuple[Any, Tensor]]]:
    """Yield lists of so many batches (x, y)."""
    there = iter(batches)
    while part := [(x, y) for x, y, *_ in islice(there, turn)]:
        yield part


def _again(passes: Sequence[Mapping[str, Sequence[float]]], seconds: float) -> bool:
    """Say whether another pass is wanted, and likely to be over in time."""
    unsteady = any(_steadiness(passes, name).get("spread", math.inf) > STEADY for name in [*passes[0]][1:])
    then = seconds * (len(passes) + 1) / len(passes)
    return then < PASSES_S and (len(passes) < PASSES or unsteady)


def _steadiness(passes: Sequence[Mapping[str, Sequence[float]]], name: str) -> dict[str, float]:
    """Return the number of passes, and the spread of the ratio of energies to the first setting's if there is one."""
    first = next(iter(passes[0]))
    ratios = [p[name][0] / p[first][0] for p in passes if p[first][0]]
    return {"passes": len(passes)} | ({"spread": median_spread(ratios)} if len(ratios) > 1 else {})


def _together(parts: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return one mapping for all: lists of counts added up, numbers averaged over images."""
    images = sum(n for n, _ in parts)
    return {
        key: [sum(c) for c in zip(*(told[key] for _, told in parts), strict=True)]
        if isinstance(value, list)
        else sum(n * told[key] for n, told in parts) / images
        for key, value in parts[0][1].items()
    }
