"""Settings measured in turns: seconds and joules of one unit of work, on a GPU or, as a rehearsal,
on a processor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from greenvis.meters import pricing
from greenvis.meters.energy import Meter
from greenvis.meters.speed import in_turn


class NotMeasured(Exception):
    """A cell or a row that cannot be had here; its text says why."""


@dataclass(frozen=True)
class Bench:
    """Where a cell runs and how large it is.

    device: the model's. small: the rehearsal's tiny sizes. look_s: seconds a setting works in each
    round. rounds: rounds in which all settings take turns.
    """

    device: torch.device
    small: bool
    look_s: float
    rounds: int
    meter: Meter = field(default_factory=Meter)

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size on a GPU, or the rehearsal's."""
        return tiny if self.small else full

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    bench: Bench, arms: Mapping[str, tuple[Callable[[], Any], int]]
) -> list[dict[str, Any]]:
    """Return one row per setting: {"setting", "ms", "units_per_s", "gpu_j", "total_j", "speedup",
    "energy_ratio", "low", "high", "observed"}.

    arms: by name, a call and how many units (images) it works on. Settings take turns in each
    round, in turned order every other one; ms is per call, joules are per unit, medians over
    rounds; speedup and energy_ratio are medians of each round's own ratio to the first setting; low
    and high are the range of that energy ratio (of the time's, where energy is not known).
    observed: what the meter saw in each round, from which other coefficients can price it.
    """
    calls = {name: _calls(bench, call) for name, (call, _) in arms.items()}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for i in range(bench.rounds):
        for name in in_turn(arms, i):
            call, units = arms[name]
            bench.sync()
            before, start = bench.meter.read(), time.perf_counter()
            for _ in range(calls[name]):
                call()
            bench.sync()
            seconds, after = time.perf_counter() - start, bench.meter.read()
            observed = {key: after[key] - before[key] for key in before if key in after}
            work = {"seconds": seconds, "calls": calls[name], "units": units * calls[name]}
            rounds[name].append(work | {"observed": observed, **_joules(bench, observed)})
    return [_row(name, rounds[name], rounds[next(iter(arms))]) for name in arms]


def _calls(bench: Bench, call: Callable[[], Any]) -> int:
    """Return how many calls fill a look, after two that warm up."""
    call()
    call()
    bench.sync()
    start = time.perf_counter()
    call()
    bench.sync()
    return max(1, math.ceil(bench.look_s / max(time.perf_counter() - start, 1e-6)))


def _joules(bench: Bench, observed: Mapping[str, float]) -> dict[str, float | None]:
    readings = pricing.energy(observed, bench.meter.components)
    gpu = readings.get("gpu")
    total = pricing.add(readings.values()).value
    return {"gpu_j": gpu.value if gpu else None, "total_j": total}


def _row(name: str, rounds: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    def per_unit(r: Mapping[str, Any], key: str) -> float | None:
        return None if r[key] is None else r[key] / r["units"]

    def ratios(key: str) -> list[float]:
        pairs = [(per_unit(a, key), per_unit(b, key)) for a, b in zip(rounds, first, strict=True)]
        return [a / b for a, b in pairs if a is not None and b]

    energy = ratios("total_j")
    judged = energy or ratios("seconds")
    return {
        "setting": name,
        "ms": statistics.median(r["seconds"] / r["calls"] for r in rounds) * 1e3,
        "units_per_s": statistics.median(r["units"] / r["seconds"] for r in rounds),
        "gpu_j": _median([per_unit(r, "gpu_j") for r in rounds]),
        "total_j": _median([per_unit(r, "total_j") for r in rounds]),
        "speedup": 1 / statistics.median(ratios("seconds")),
        "energy_ratio": statistics.median(energy) if energy else None,
        "low": min(judged),
        "high": max(judged),
        "observed": [r["observed"] | {"units": r["units"]} for r in rounds],
    }


def _median(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known and len(known) == len(values) else None
