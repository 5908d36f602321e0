"""What serving a model costs, in joules: repeated readings of an image, and of the settings of one
model. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from greenvis.meters.pricing import joules, numbers
from greenvis.meters.record import Reading, Run


def facts(run: Run) -> dict[str, Any]:
    """Return a run's facts with the joules of what they observe: inference_energy_j, also of
    settings, and task_energy_j.

    Older records hold those joules themselves.
    """
    out, components = dict(run.facts), run.header.get("components") or []
    if (
        isinstance(out.get("inference"), Mapping)
        and (served := image(out["inference"], components)) is not None
    ):
        out["inference_energy_j"] = served
    rows = out.get("operating_points")
    if isinstance(rows, list) and all(
        isinstance(r, Mapping) and isinstance(r.get("passes"), list) for r in rows
    ):
        out["operating_points"] = settings(rows, components)
    if isinstance(out.get("task_observed"), list):
        out["task_energy_j"] = [
            None if t is None else joules(t, components).value for t in out["task_observed"]
        ]
    return out


def image(
    served: Mapping[str, Any], components: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the joules of one image: of repeated readings {"samples", observations} the median,
    with its spread.

    None where a reading tells no energy.
    """
    entries = served.get("rounds")
    totals = [numbers(r) for r in entries] if isinstance(entries, list) else []
    rounds = [(r.get("samples", 0.0), _step(r, components)) for r in totals]
    if not rounds or any(n <= 0 or j.value is None for n, j in rounds):
        return None
    each = sorted((j.value or 0.0) / n for n, j in rounds)
    n, middle = sorted(rounds, key=lambda r: (r[1].value or 0.0) / r[0])[len(rounds) // 2]
    if not middle.value:  # a counter that stands still in most rounds steps too rarely for them
        return None
    bounds = {k: (getattr(middle, k) or 0.0) / n for k in ("value", "low", "high")}
    more = {"provenance": middle.provenance, "spread": median_spread(each), "rounds": len(rounds)}
    return {**bounds, **more, "batch_size": served.get("batch_size")}


def settings(
    rows: Sequence[Mapping[str, Any]], components: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return settings of one model with their joules: each has "images" and "passes", the
    observations of each pass over them.

    The joules are the median pass's; "spread" is of the ratio to the first setting's.
    """
    passes = [[_step(numbers(p), components) for p in row["passes"]] for row in rows]
    out = []
    for row, own in zip(rows, passes, strict=True):
        served = None
        images = numbers(row).get("images", 0.0)
        if (
            own
            and images > 0
            and all(
                len(each) == len(own) and None not in [j.value for j in each] for each in passes
            )
        ):
            middle = sorted(own, key=lambda j: j.value or 0.0)[len(own) // 2]
            served = {k: (getattr(middle, k) or 0.0) / images for k in ("value", "low", "high")}
            served |= steadiness([j.value or 0.0 for j in own], [j.value or 0.0 for j in passes[0]])
        out.append(
            {**{k: v for k, v in row.items() if k != "passes"}, "inference_energy_j": served}
        )
    return out


def _step(totals: Mapping[str, float], components: Sequence[Mapping[str, Any]]) -> Reading:
    """Return the joules of a short time: a counter that did not step in it says nothing of its own
    health."""
    result = joules(totals, components)
    still = result.value is None and any(c.get("observation") in totals for c in components)
    return result._replace(value=0.0, low=0.0, high=0.0) if still else result


def steadiness(own: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """Return the number of passes, and the spread of the ratio of their energies to the first
    setting's if there is one."""
    ratios = [a / b for a, b in zip(own, first, strict=True) if b]
    return {"passes": len(own)} | ({"spread": median_spread(ratios)} if len(ratios) > 1 else {})


def median_spread(values: Sequence[float]) -> float:
    """Return how far a median of these positive readings is off by chance, as a share of it:
    quartile range ÷ √count.

    That is about its standard error, and one reading that a neighbour on the machine disturbed does
    not move it. Infinite for fewer than two.
    """
    if len(values) < 2:
        return math.inf
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / math.sqrt(len(values)) / middle if middle else 0.0
