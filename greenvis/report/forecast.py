"""What `greenvis plan` said a run would take, beside what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import Reading
from greenvis.report import arms as arms_
from greenvis.report.groups import SeedRun

BOUNDS = ("value", "low", "high")
STAGES = ("train", "teacher", "eval")  # what a plan predicts: not set-up, not measurement


def predicted(done: list[SeedRun], grid: arms_.Intensity | None) -> dict[str, Any] | None:
    """Return {QUANTITY: {"value", "low", "high", "actual", "ratio", "inside", "n"}}; None where no
    plan was made.

    QUANTITY is energy_j, carbon_g, wall_s or flops of training and evaluating one seed; means over
    the finished seeds with a prediction. ratio is actual ÷ predicted. Grams are priced anew from
    the joules, on both sides with the same grid.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for run in done:
        prediction = run.done.facts.get("predicted") if run.done else None
        if not isinstance(prediction, Mapping):
            continue
        for key, actual in _actual(run, grid).items():
            band = _band(run, prediction, key, grid)
            if band and actual is not None:
                rows.setdefault(key, []).append((*band, actual))
    return {key: _summary(bands) for key, bands in rows.items()} or None


def _summary(rows: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    value, low, high, actual = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
    ratio = actual / value if value > 0 else None
    return {
        "value": value, "low": low, "high": high, "actual": actual, "ratio": ratio,
        "inside": low <= actual <= high,
        "n": len(rows),
    }  # fmt: skip


def _actual(run: SeedRun, grid: arms_.Intensity | None) -> dict[str, float | None]:
    """Return what the attempts behind a result took for what a plan predicts."""
    parts = [
        (a, pricing.add(r for s in STAGES for r in a.energy.get(s, {}).values())) for a in run.chain
    ]
    totals = [a.totals[s] for a in run.chain for s in STAGES if s in a.totals]
    return {
        "energy_j": pricing.add(r for _, r in parts).value,
        "carbon_g": pricing.add(arms_.attempt_grams(a, r, grid) for a, r in parts).value,
        **{
            k: math.fsum(t[k] for t in totals if k in t) if any(k in t for t in totals) else None
            for k in ("wall_s", "flops")
        },
    }


def _band(
    run: SeedRun, prediction: Mapping[str, Any], key: str, grid: arms_.Intensity | None
) -> tuple[float, float, float] | None:
    """Return (value, low, high) of a prediction; None where the fact does not have the three
    numbers."""
    figures = {
        q: f
        for q, f in prediction.items()
        if isinstance(f, Mapping) and all(_number(f.get(b)) for b in BOUNDS)
    }
    figure = figures.get("energy_j" if key == "carbon_g" else key)
    # observations, priced as the run itself is
    if figure is None and key in ("energy_j", "carbon_g") and run.done:
        components = run.done.header.get("components") or []
        figure = (
            pricing.forecast(figures, components)
            if any(c.get("observation") in figures for c in components)
            else None
        )
    if figure is None:
        return None
    numbers = [float(figure[b]) for b in BOUNDS]
    if key == "carbon_g" and run.done:
        grams = [arms_.attempt_grams(run.done, Reading("energy_j", j), grid).value for j in numbers]
        numbers = [g for g in grams if g is not None]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
