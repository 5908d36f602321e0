"""How far the same work reads apart on this machine (`greenvis doctor --repeat`): the band of what
is told by CPU time.

Readings add up in one file a machine. Those of one sitting say little of another day: until some
lie `APART_H` apart, the band is the general one, widened where they read further apart.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput
from greenvis.meters import host

APART_H = 12.0
LEAST, MOST = 5, 1000  # readings a band is made of; the newest count
TIMES, EVERY_S = 12, 5.0


def path() -> Path:
    """Return where this machine's readings lie."""
    name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return (
        Path("~/.cache/greenvis").expanduser()
        / f"repeatability-{re.sub(r'[^A-Za-z0-9-]', '_', name)[:80]}.json"
    )


def work() -> float:
    """Return the CPU seconds that a small, fixed training takes now."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(10),
        )
        images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        model(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    began = time.process_time()
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return time.process_time() - began


def measure(
    processor: str, times: int = TIMES, every_s: float = EVERY_S, reading: Callable[[],
    float] = work,
    say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Do the same work `times` times, one each `every_s` seconds, and add what it took to this
    machine's readings."""
    reading()  # first calls of the libraries are no part of it
    new: list[list[float]] = []
    began = time.monotonic()
    for number in range(times):
        time.sleep(max(0.0, began + number * every_s - time.monotonic()))
        new.append([time.time(), reading()])
        say(f"{number + 1} of {times}: {new[-1][1]:.3f} s of CPU time")
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    readings = [*_readings(processor), *new][-MOST:]
    files.write(
        file, json.dumps({"processor": processor, "cpus": host.cpus(), "readings": readings})
    )


def band(processor: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return {"low", "central", "high", "unit", "citation"}: of this machine's readings, else the
    default. Never raises."""
    readings = _readings(processor)
    if len(readings) < LEAST:
        return default
    values = [value for _, value in readings]
    middle = statistics.median(values)
    low, high = min(values) / middle, max(values) / middle
    hours = (max(at for at, _ in readings) - min(at for at, _ in readings)) / 3600
    summary = f"{len(readings)} runs over {hours:.2g} h read ×{max(values) / min(values):.3g} apart"
    measured = f"measured on this machine: {summary}"
    if hours < APART_H:
        low, high = min(low, default["low"]), max(high, default["high"])
        measured = (
            f"default, for {APART_H:g} h must lie between runs (on this machine {summary}): "
            f"{default['citation']}"
        )
    return {
        **default,
        "low": low,
        "high": high,
        "runs": len(readings),
        "hours": hours,
        "citation": measured,
    }


def _readings(processor: str) -> list[tuple[float, float]]:
    """Return (seconds since 1970, CPU seconds) of this machine; none of another processor, and none
    of a file gone bad."""
    try:
        held = files.read_json(path(), "readings of repeatability", 2**20)
        if (held["processor"], held["cpus"]) != (processor, host.cpus()):
            return []
        readings = [(float(at), float(value)) for at, value in held["readings"]]
    except (
        BadInput,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # no home: no readings
        return []
    return [(at, value) for at, value in readings if 0 < value < 3600 and 0 < at < 1e11][-MOST:]
