"""Models that answer the same batch in turns, metered."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from greenvis.meters.devices import wait
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker


def measured(
    arms: dict[str, nn.Module], x: Any, device: torch.device, rounds: int, run: Tracker
) -> dict[str, list[tuple[float, float | None]]]:
    """Return seconds and joules of one batch, a tensor or an `Example`, by arm and round."""
    timings: dict[str, list[tuple[float, float | None]]] = {name: [] for name in arms}
    x, clock = x.to(device), time.perf_counter if device.type == "cuda" else time.process_time
    with torch.inference_mode():
        for arm in arms.values():
            arm.to(device)(x[:2])
        for i in range(rounds):
            for name in in_turn(arms, i):
                wait([device])
                before, start = run.energy().value, clock()
                arms[name](x)
                wait([device])
                seconds, after = clock() - start, run.energy().value
                timings[name].append(
                    (seconds, None if before is None or after is None else after - before)
                )
    return timings
