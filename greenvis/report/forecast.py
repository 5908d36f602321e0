"""What `greenvis plan` said a run would take, beside what it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import Reading
from greenvis.report.arm_results import Planned
from greenvis.report.facts import BOUNDS
from greenvis.report.runs import RunSummary, SeedRun

STAGES = ("train", "teacher", "eval")  # what a plan predicts: not set-up, not measurement


def predicted(done: list[SeedRun], grid: Mapping[str, Any] | None) -> dict[str, Planned]:
    """Return prediction and outcome by quantity; {} where no plan was made.

    QUANTITY is energy_j, carbon_g, wall_s or flops of training and evaluating one seed; means over
    the finished seeds with a prediction. ratio is actual ÷ predicted. Grams are priced anew from
    the joules, on both sides with the same grid.
    """
    rows: dict[str, list[tuple[float, float, float, float]]] = {}
    for run in done:
        if run.done is None or not run.done.facts.predicted:
            continue
        for key, actual in _actual(run, grid).items():
            band = _band(run.done, key, grid)
            if band and actual is not None:
                rows.setdefault(key, []).append((*band, actual))
    return {key: _summary(bands) for key, bands in rows.items()}


def _summary(rows: list[tuple[float, float, float, float]]) -> Planned:
    value, low, high, actual = (math.fsum(column) / len(rows) for column in zip(*rows, strict=True))
    ratio = actual / value if value > 0 else None
    inside = low <= actual <= high
    return Planned(
        value=value, low=low, high=high, actual=actual, ratio=ratio, inside=inside, n=len(rows)
    )


def _actual(run: SeedRun, grid: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Return what the attempts behind a result took for what a plan predicts."""
    parts = [
        (a, pricing.add(r for s in STAGES for r in a.energy.get(s, {}).values())) for a in run.chain
    ]
    totals = [a.totals[s] for a in run.chain for s in STAGES if s in a.totals]
    return {
        "energy_j": pricing.add(r for _, r in parts).value,
        "carbon_g": pricing.add(a.grams(r, grid) for a, r in parts).value,
        **{
            k: math.fsum(t[k] for t in totals if k in t) if any(k in t for t in totals) else None
            for k in ("wall_s", "flops")
        },
    }


def _band(
    run: RunSummary, key: str, grid: Mapping[str, Any] | None
) -> tuple[float, float, float] | None:
    """Return (value, low, high) of a prediction; None where none was made of that quantity."""
    figures = run.facts.predicted
    figure = figures.get("energy_j" if key == "carbon_g" else key)
    # observations, priced as the run itself is
    if figure is None and key in ("energy_j", "carbon_g"):
        components = run.setup.components
        if any(c.get("observation") in figures for c in components):
            figure = pricing.forecast(figures, components)
    if figure is None:
        return None
    numbers = [figure[b] for b in BOUNDS]
    if key == "carbon_g":
        grams = [run.grams(Reading("energy_j", j), grid).value for j in numbers]
        numbers = [g for g in grams if g is not None]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None
