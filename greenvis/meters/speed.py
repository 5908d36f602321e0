"""Latency after warm-up, on the device the model is on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from greenvis.core.example import Example, call
from greenvis.core.modes import in_mode
from greenvis.errors import BadInput
from greenvis.meters.devices import asynchronous, wait

WARM_UP = 3
T = TypeVar("T")


def latency(
    model: nn.Module, x: Tensor, *, seconds: float = 2.0, least: int = 10, most: int = 1000
) -> dict[str, Any]:
    """Return one call's time in milliseconds, in eval mode and without gradients.

    Args:
        model: any module.
        x: a batch (batch, …) on the model's device.
        seconds: for about which calls are repeated.
        least: the fewest calls.
        most: the most calls.

    Returns:
        {"p50", "p95", "mean", "batch_size", "calls"}.
    """
    plain = isinstance(x, Tensor) and x.dim() > 0
    if not (plain or isinstance(x, Example)) or len(x) == 0:
        raise BadInput(
            "latency needs a batch of at least one image, (batch, …), not "
            f"{getattr(x, 'shape', x)!r}"
        )
    times: list[float] = []
    waiting = asynchronous(model, x)
    with in_mode(model, False), torch.inference_mode():
        for _ in range(WARM_UP):
            call(model, x)
        end = time.perf_counter() + seconds
        while len(times) < least or (time.perf_counter() < end and len(times) < most):
            wait(waiting)
            start = time.perf_counter()
            call(model, x)
            wait(waiting)
            times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {
        "p50": quantile(times, 0.50), "p95": quantile(times, 0.95),
        "mean": math.fsum(times) / len(times),
        "batch_size": len(x), "calls": len(times),
    }  # fmt: skip


def quantile(ordered: list[float], q: float) -> float:
    """Return a quantile of values in ascending order: the least that has a share `q` at or below
    it."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def in_turn(settings: Iterable[T], number: int) -> list[T]:
    """Return settings in the order of a round: it turns around every other round, so that none
    always comes first.

    Args:
        settings: What takes turns.
        number: Of the round, from 0.
    """
    return [*settings][:: 1 if number % 2 == 0 else -1]
