"""The noise floor: how far arms that do the same work read apart. What is smaller is no
difference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from greenvis.report import formatting, stats
from greenvis.report.arm_results import ArmResults
from greenvis.report.estimates import Ratio
from greenvis.report.shape import Floor, Floors, Results

# quantities to which each floor belongs
TRAINING = ("train_energy", "total_energy", "train_energy_with_reuse")
SERVING = ("inference_energy",)


def floors(results: Results) -> Floors:
    """Return how many times apart, at most, arms of equal work are, and which arms these are.

    Training: arms of the same inputs (data, model, settings), whatever they are called; results of
    before there were inputs do not say. Serving: arms whose finished networks are the same: of one
    model, with as many MACs and parameters.
    """
    rows = {a: r for a, r in results.arms.items() if r.seeds}
    return Floors(
        training=_apart(rows, lambda r: r.inputs, lambda r: r.train_energy_j.seeds),
        serving=_apart(rows, _network, lambda r: r.inference_energy_j.seeds),
    )


def _network(row: ArmResults) -> Any:
    """Return what is the same in two arms whose finished networks are; None where nothing says."""
    if "network" in row.model_fields_set:
        return row.network
    counts = [row.macs, row.params]  # all that older results hold
    return counts if all(counts) else None


def _apart(
    rows: Mapping[str, ArmResults],
    work: Callable[[ArmResults], Any],
    joules: Callable[[ArmResults], stats.Seeds],
) -> Floor | None:
    alike: dict[str, dict[str, float]] = {}  # mean logarithms of arms of the same work
    for a, row in rows.items():
        values = joules(row).values()
        if (key := work(row)) is not None and values and min(values) > 0:
            logs = [math.log(j) for j in values]
            alike.setdefault(json.dumps(key, default=str), {})[a] = math.fsum(logs) / len(logs)
    groups = [group for group in alike.values() if len(group) > 1]
    if not groups:
        return None
    return Floor(
        ratio=math.exp(max(max(g.values()) - min(g.values()) for g in groups)),
        arms=[a for a in rows if any(a in g for g in groups)],
    )


def widened(ratios: Mapping[str, Ratio | None], floors: Floors) -> dict[str, Ratio | None]:
    """Return ratios to the baseline with the floor in their intervals."""
    out = dict(ratios)
    for floor, quantities in ((floors.training, TRAINING), (floors.serving, SERVING)):
        for q in quantities if floor else ():
            r = out.get(q)
            if floor and r and r.low is not None and r.high is not None:
                wide = {"low": r.low / floor.ratio, "high": r.high * floor.ratio}
                out[q] = r.model_copy(update=wide)
    return out


def brief(results: Results) -> str:
    """Return the floor for a cell: "training ×1.03, image ×1.21", or "unknown"."""
    parts = [f"{kind} {_factor(f)}" for kind, f in _known(results, "training", results.unit)]
    return ", ".join(parts) or "unknown"


def sentence(results: Results) -> str:
    """Say what the floor of the tables is."""
    parts = [
        f"{kind} {_factor(f)} ({', '.join(f.arms[:6])})"
        for kind, f in _known(results, "training", f"one {results.unit}")
    ]
    if not parts:
        return "Noise floor: not known, for no two arms did the same work."
    return (
        f"Noise floor, by which arms that did the same work read apart: {'; '.join(parts)}. It is "
        "in the intervals of energies: "
        "a smaller difference is none."
    )


def _known(results: Results, training: str, serving: str) -> list[tuple[str, Floor]]:
    floors = results.noise_floor or Floors()
    pairs = ((training, floors.training), (serving, floors.serving))
    return [(kind, floor) for kind, floor in pairs if floor]


def _factor(floor: Floor) -> str:
    return f"×{formatting.figures(max(floor.ratio, 1.001), 3)}"
