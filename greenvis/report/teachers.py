"""Several teachers of one student: how much they contradicted each other, and what weights they
were given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.report import formatting

MEASURES = ("disagreement", "kl", "cosine")


def teachers(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {"conflict": {measure: [first epoch, last]}, "weights": {teacher: weight}}, means over
    runs; {} where none says.

    facts: of each run; a conflict is a mapping of `MEASURES` to one number an epoch, weights a fact
    "…_teachers".
    """
    runs = list(facts)
    conflicts = [
        v
        for one in runs
        for v in one.values()
        if isinstance(v, Mapping) and all(_numbers(v.get(m)) for m in MEASURES)
    ]
    learned = [
        v
        for one in runs
        for k, v in one.items()
        if k.endswith("_teachers") and isinstance(v, Mapping) and v
    ]
    out: dict[str, Any] = {}
    if conflicts:
        out["conflict"] = {
            m: [_mean(f[m][0] for f in conflicts), _mean(f[m][-1] for f in conflicts)]
            for m in MEASURES
        }
    if learned and all(learned[0].keys() == g.keys() and _numbers([*g.values()]) for g in learned):
        out["weights"] = {name: _mean(g[name] for g in learned) for name in learned[0]}
    return out


def section(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the report; empty where no arm had several teachers."""
    cells = []
    for a in results["order"]:
        summary = results["arms"][a].get("teachers", {})
        if summary:
            spans = summary.get("conflict", {})
            weights = ", ".join(
                f"{name} {weight:.2f}" for name, weight in summary.get("weights", {}).items()
            )
            cells.append([a, *(_span(spans.get(m)) for m in MEASURES), weights or "not learned"])
    head = [
        "Arm",
        "Choose other classes",
        "Divergence (nats)",
        "Cosine of their pulls",
        "Learned weights",
    ]
    text = (
        "Between each two teachers, in the first epoch → in the last, means over seeds: how often "
        "they choose other classes, "
        "how far their softened answers are apart, and the cosine between the gradients that each "
        "alone would give the "
        "student's logits (below 0 they pull it apart)."
    )
    table = {"head": head, "rows": cells} if cells else None
    return {"title": "Several teachers", "items": [text] if cells else [], "table": table}


def _numbers(value: Any) -> bool:
    kind = (int, float)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, kind) and math.isfinite(v) for v in value)
    )


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)


def _span(ends: list[float] | None) -> str:
    return formatting.MISSING if ends is None else " → ".join(formatting.fixed(v, 2) for v in ends)
