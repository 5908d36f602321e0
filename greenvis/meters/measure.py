"""What a finished model costs to serve, as facts for its run record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.meters import flops, speed
from greenvis.meters.track import Tracker

LOOK_S = 0.5  # seconds of inference for latency, and again for throughput and the energy of one image


def measure(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Return MACs, parameters, latency, throughput and energy of one image (joules).

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
        **_serve(model, x, run),
    }


def _serve(model: nn.Module, x: Tensor, run: Tracker) -> dict[str, Any]:
    """Serve batches for a while; return images per second and the energy of one image by the run's own meter."""
    model.eval()
    with torch.inference_mode(), run.phase("serve"):
        model(x)
        before, started, images = run.energy(), time.perf_counter(), 0
        while images == 0 or time.perf_counter() - started < LOOK_S:
            model(x)
            images += len(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds, after = time.perf_counter() - started, run.energy()
        run.add(samples=images)
    out: dict[str, Any] = {"images_per_s": images / seconds}
    if before.value is not None and after.value is not None:
        out["inference_energy_j"] = {
            "value": (after.value - before.value) / images,
            "low": ((after.low or 0.0) - (before.low or 0.0)) / images,
            "high": ((after.high or 0.0) - (before.high or 0.0)) / images,
            "provenance": after.provenance,
            "batch_size": len(x),
        }
    return out


def compare(
    points: Mapping[str, AbstractContextManager[dict[str, Any]]],
    answer: Callable[[Any], Tensor],
    batches: Callable[[], Iterable[Any]],
    run: Tracker,
) -> list[dict[str, Any]]:
    """Return what a model that can be switched reaches and costs at each setting: accuracy, joules an image, facts of its own.

    points: contexts by name; each gives a mapping that holds its facts afterwards. answer: images to logits. batches: (x, y)
    to serve, once a setting; reading them is not counted.
    """
    rows = []
    with torch.inference_mode():
        answer(next(iter(batches()))[0])  # the first setting is not to pay for a cold start
    for name, point in points.items():
        right = images = 0
        spent, known = [0.0, 0.0, 0.0], True
        with point as facts, torch.inference_mode(), run.phase("serve"):
            for x, y in batches():
                before = run.energy()
                hits = answer(x).argmax(-1).cpu() == y
                after = run.energy()
                right, images = right + int(hits.sum()), images + len(y)
                known &= before.value is not None and after.value is not None
                for i, key in enumerate(("value", "low", "high")):
                    spent[i] += (getattr(after, key) or 0.0) - (getattr(before, key) or 0.0)
            run.add(samples=images)
        joules = dict(zip(("value", "low", "high"), (s / images for s in spent), strict=True)) if known and images else None
        row = {"setting": name, "accuracy": right / max(images, 1), "inference_energy_j": joules, "images": images}
        rows.append(row | facts)
    return rows
