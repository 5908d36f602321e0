"""The noise floor: how far arms that do the same work read apart. What is smaller is no
difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from greenvis.report import formatting, stats

# quantities to which each floor belongs
TRAINING = ("train_energy", "total_energy", "train_energy_with_reuse")
SERVING = ("inference_energy",)
_BRIEF = (("training", "training"), ("image", "serving"))


def floors(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"training", "serving"}: {"ratio": how many times apart, at most, "arms": those
    compared}, or None.

    Training: arms of the same inputs (data, model, settings), whatever they are called; results of
    before there were inputs do not say. Serving: arms whose finished networks are the same: of one
    model, with as many MACs and parameters.
    """
    rows = {a: r for a, r in results["arms"].items() if r["seeds"]}
    return {
        "training": _apart(rows, lambda r: r.get("inputs"), "train_energy_j"),
        "serving": _apart(rows, _network, "inference_energy_j"),
    }


def _network(row: Mapping[str, Any]) -> Any:
    """Return what is the same in two arms whose finished networks are; None where nothing says."""
    if "network" in row:
        return row["network"]
    counts = [row["macs"], row["params"]]  # all that older results hold
    return counts if all(counts) else None


def _apart(rows: Mapping[str, Any], work: Any, reading: str) -> dict[str, Any] | None:
    pairs = [
        (math.exp(abs(math.log(r["ratio"]))), a, b)
        for a, b in combinations(rows, 2)
        if work(rows[a]) is not None and work(rows[a]) == work(rows[b])
        and (r := stats.ratio(rows[a][reading].get("by_seed") or {},
        rows[b][reading].get("by_seed") or {})) and r["ratio"] > 0
    ]  # fmt: skip
    if not pairs:
        return None
    return {
        "ratio": max(ratio for ratio, *_ in pairs),
        "arms": [a for a in rows if any(a in pair for pair in pairs)],
    }


def widened(vs: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return ratios to the baseline with the floor in their intervals."""
    out = dict(vs)
    for kind, quantities in (("training", TRAINING), ("serving", SERVING)):
        floor = results["noise_floor"][kind]
        for q in quantities if floor else ():
            r = out.get(q)
            if r and r["low"] is not None:
                out[q] = {**r, "low": r["low"] / floor["ratio"], "high": r["high"] * floor["ratio"]}
    return out


def brief(results: Mapping[str, Any]) -> str:
    """Return the floor for a cell: "training ×1.03, image ×1.21", or "unknown"."""
    floor = results.get("noise_floor") or {}
    parts = [
        f"{k} ×{formatting.figures(max(f['ratio'], 1.001), 3)}"
        for k, f in ((w, floor.get(t)) for w, t in _BRIEF)
        if f
    ]
    return ", ".join(parts) or "unknown"


def sentence(results: Mapping[str, Any]) -> str:
    """Say what the floor of the tables is."""
    kinds = {"training": "training", "serving": "one image"}
    known = {kind: f for kind in kinds if (f := (results.get("noise_floor") or {}).get(kind))}
    parts = [
        f"{kinds[k]} ×{formatting.figures(max(f['ratio'], 1.001), 3)} ({', '.join(f['arms'][:6])})"
        for k, f in known.items()
    ]
    if not parts:
        return "Noise floor: not known, for no two arms did the same work."
    return (
        f"Noise floor, by which arms that did the same work read apart: {'; '.join(parts)}. It is "
        "in the intervals of energies: "
        "a smaller difference is none."
    )
