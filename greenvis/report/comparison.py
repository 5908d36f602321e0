"""What an arm is worth: ratios to the baseline paired by seed, what they decide, payback, the full
cycle, SCI."""

from __future__ import annotations

import math
from typing import Any

from greenvis.meters import pricing
from greenvis.report import arms as arms_
from greenvis.report import floor, formatting, stats
from greenvis.report.arms import Arm
from greenvis.report.groups import Attempt, SeedRun

# an arm's readings that are compared
READINGS = ("train_energy_j", "train_energy_with_reuse_j", "inference_energy_j")


def compare(results: dict[str, Any]) -> None:
    """Put into each arm of the results how it compares with the baseline, from values by seed:
    `vs_baseline`, `full_cycle`.

    Everything here is derived: `results.json` of older rules, or with another baseline or margin,
    is compared anew by this.
    """
    table, base, metric = results["arms"], results["baseline"], results["metric"]
    for row in table.values():
        row["vs_baseline"] = None
        row["full_cycle"] = full_cycle(row, results["served"])
    if base is None or not table[base]["seeds"]:
        return
    results["noise_floor"] = floor.floors(results)
    by_seed = {label: _by_seed(row, metric) for label, row in table.items() if row["seeds"]}
    rivals = [a for a in by_seed if a != base]
    results["comparisons"] = many = sum(
        len({*table[a]["seeds"]} & {*table[base]["seeds"]}) > 1 for a in rivals
    )
    for label in rivals:
        own, bases = by_seed[label], by_seed[base]
        vs = {k: stats.ratio(own[k], bases[k], many) for k in own if k != metric and k in bases}
        vs = floor.widened(vs, results)
        gain = stats.difference(own[metric], bases[metric], many)
        vs[metric] = gain and gain | stats.decide(
            gain, allowed(results), many, results["lower_is_better"]
        )
        vs["payback"] = _payback(own, bases, vs["inference_energy"])
        table[label]["vs_baseline"] = vs


def allowed(results: dict[str, Any]) -> float:
    """Return how much of the metric may be lost, in its own unit: `margin` is in points for a share
    of 1."""
    return results["margin"] / 100 if formatting.share(results["metric"]) else results["margin"]


def _by_seed(row: dict[str, Any], metric: str) -> dict[str, dict[str, float]]:
    """Return what is compared, by quantity and seed; the metric among it."""
    readings = {k.removesuffix("_j"): row[k].get("by_seed") or {} for k in READINGS}
    return {**row["by_seed"], **readings, metric: row[metric]["by_seed"]}


def _payback(
    own: dict[str, dict[str, float]], base: dict[str, dict[str, float]], use: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Break-even images against the baseline, without and with what each builds on; the range is
    over seeds.

    Where the interval does not show that one image costs less or more, dividing by that difference
    would divide by noise.
    """
    infer, infer_b = own["inference_energy"], base["inference_energy"]
    out: dict[str, Any] = {}
    for key, cost in (("own", "train_energy"), ("with_reuse", "train_energy_with_reuse")):
        make, make_b = own[cost], base[cost]
        means = [stats.summary(x)["mean"] for x in (make, make_b, infer, infer_b)]
        if any(m is None for m in means):
            return None
        if not formatting.shown(use):
            out[key] = {
                "verdict": "not shown",
                "images": None,
                "low": None,
                "high": None,
                "seeds_agree": None,
            }
            continue
        out[key] = stats.payback(means[0] - means[1], means[3] - means[2])
        seeds = [s for s in make if s in make_b and s in infer and s in infer_b]
        single = [stats.payback(make[s] - make_b[s], infer_b[s] - infer[s]) for s in seeds]
        agree = len(single) > 1 and all(x["verdict"] == out[key]["verdict"] for x in single)
        images = [x["images"] for x in single if x["images"] is not None]
        out[key] |= {
            "low": min(images) if agree and images else None,
            "high": max(images) if agree and images else None,
        }
        out[key]["seeds_agree"] = agree
    return out


def reach(
    table: dict[str, dict[str, Any]], arms: dict[str, Arm], base: str | None, metric: str
) -> None:
    """Add to each arm the joules at which it reached the baseline's final metric."""
    if base is not None and arms[base].done:
        for label, arm in arms.items():
            table[label]["energy_to_baseline_j"] = _energy_to(
                arm, table[base][metric]["mean"], lower_is_better(metric)
            )


def _energy_to(arm: Arm, target: float | None, lower: bool) -> dict[str, Any] | None:
    """Joules until the metric reached the baseline's final mean and stayed there, by finished
    seed."""
    if target is None:
        return None
    sign = -1.0 if lower else 1.0
    to_target = {
        s: stats.energy_to([(j, sign * y) for j, y in curve(r)], sign * target)
        for s, r in arm.done.items()
        if len(curve(r)) > 1
    }
    reached = {s: v for s, v in to_target.items() if v is not None}
    return (
        {**stats.summary(reached), "target": target, "not_reached": len(to_target) - len(reached)}
        if to_target
        else None
    )


def curve(run: SeedRun) -> list[tuple[float, float]]:
    """Return (joules spent so far, metric) over the attempts that led to a result: a broken one's
    come first."""
    points, before = [], 0.0
    for attempt in run.chain:
        points += [(before + j, y) for j, y in attempt.curve]
        before += attempt.training_energy_j.value or 0.0
    return points


def thin(points: list[tuple[float, float]], most: int = 100) -> list[tuple[float, float]]:
    """Return at most about `most` of the points, evenly taken, the last one always."""
    return (
        points[:: max(1, -(-len(points) // most))][: most - 1] + points[-1:]
        if len(points) > most
        else points
    )


def full_cycle(row: dict[str, Any], served: float) -> dict[str, Any]:
    """Joules to make the model once and use it on `served` images, with what it reuses charged
    whole and shared.

    What others made, at a cost nobody knows, is in none of these: `uses` names it.
    """
    make, infer, base = (
        row["train_energy_j"]["value"],
        row["inference_energy_j"]["value"],
        row["base_reuse"],
    )
    reused, shared = (base["whole_j"]["value"], base["shared_j"]) if base else (0.0, 0.0)
    serve = None if infer is None else infer * served
    known = make is not None and serve is not None
    return {
        "served": served,
        "make_j": make,
        "reuse_whole_j": reused,
        "reuse_shared_j": shared,
        "serve_j": serve,
        "total_whole_j": math.fsum((make or 0.0, reused or 0.0, serve or 0.0)) if known else None,
        "total_shared_j": math.fsum((make or 0.0, shared or 0.0, serve or 0.0)) if known else None,
        "wh_per_1000_images": None if infer is None else infer * 1000 / 3600,
    }


def sci(row: dict[str, Any], last: Attempt | None) -> dict[str, Any]:
    """Software Carbon Intensity (ISO/IEC 21031) of one inference: ((E × I) + M) / R with R = one
    image; PUE is in E.

    I is the mean the arm's own records were priced with. M is None where no embodied carbon was
    given: not counted.
    """
    make, grams, infer = (
        row["train_energy_j"]["value"],
        row["carbon_g"]["value"],
        row["inference_energy_j"]["value"],
    )
    intensity = grams / make * pricing.JOULES_PER_KWH if make and grams is not None else None
    known = infer is not None and intensity is not None
    m = arms_.embodied_g(last, 1 / row["images_per_s"]) if last and row["images_per_s"] else None
    return {
        "e_kwh": None if infer is None else infer / pricing.JOULES_PER_KWH,
        "i_g_per_kwh": intensity,
        "m_g": m,
        "r": "one image",
        "g_per_image": (infer or 0.0) / pricing.JOULES_PER_KWH * (intensity or 0.0) + (m or 0.0)
        if known
        else None,
    }


def lower_is_better(metric: str) -> bool:
    """Return whether less of the metric is better, by its name ("loss", "val_error",
    "forgetting")."""
    return metric.lower().rsplit("_", 1)[-1] in arms_.LOWER_IS_BETTER
