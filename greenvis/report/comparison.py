"""What an arm is worth: ratios to the baseline, what they decide, payback, the full cycle, SCI."""

from __future__ import annotations

import math

from greenvis.meters import pricing
from greenvis.report import floor, formatting, stats
from greenvis.report.arm_results import ArmResults, Cycle, Sci
from greenvis.report.estimates import Payback, Paybacks, Ratio, ToTarget, Versus
from greenvis.report.measures import is_share
from greenvis.report.runs import Arm, Curve, RunSummary, SeedRun
from greenvis.report.shape import Results

NOT_SHOWN = Payback(verdict="not shown", images=None, low=None, high=None, seeds_agree=None)
Quantities = dict[str, stats.Seeds]  # values by quantity and seed


def compared(results: Results) -> Results:
    """Return results with how each arm compares with the baseline, from values by seed:
    `vs_baseline`, `full_cycle`.

    Everything here is derived: results of older rules, or with another baseline or margin, are
    compared anew by this.
    """
    rows = {
        label: row.model_copy(
            update={"vs_baseline": None, "full_cycle": full_cycle(row, results.served)}
        )
        for label, row in results.arms.items()
    }
    base = results.baseline
    results = results.model_copy(update={"arms": rows})
    if base is None or not rows[base].seeds:
        return results
    known = {label: row for label, row in rows.items() if row.seeds}
    floors = floor.floors(results)
    gains = stats.differences(
        {label: row.gain.by_seed for label, row in known.items()},
        base,
        allowed(results),
        results.lower_is_better,
        1 / n if (n := images_tested(results)) and is_share(results.measure) else 0.0,
    )
    by_seed = {label: _by_seed(row) for label, row in known.items()}
    ratios = {
        q: stats.ratios(
            {label: seeds[q] for label, seeds in by_seed.items() if q in seeds},
            base,
            {label: row.inference_energy_j.spread for label, row in known.items()}
            if q == "inference_energy"
            else None,
        )
        for q in dict.fromkeys(q for seeds in by_seed.values() for q in seeds)
    }
    many = len([a for a in known if a != base and len(rows[a].seeds) >= stats.LEAST])
    many = many if len(rows[base].seeds) >= stats.LEAST else 0
    results = results.model_copy(update={"noise_floor": floors, "comparisons": many})
    for label in known:
        if label == base:
            continue
        own = {q: each.get(label) for q, each in ratios.items() if q in by_seed[label]}
        own = floor.widened({q: r for q, r in own.items() if q in by_seed[base]}, floors)
        payback = _payback(by_seed[label], by_seed[base], own["inference_energy"])
        versus = Versus(gain=gains.get(label), payback=payback, ratios=own)
        rows[label] = rows[label].model_copy(update={"vs_baseline": versus})
    return results


def images_tested(results: Results) -> int | None:
    """Return how many images, or bags of them, the smallest test of the records has; None where
    none says."""
    known = [d.get("test") for d in results.data if isinstance(d, dict)]
    return min((n for n in known if isinstance(n, int) and n > 0), default=None)


def tested(results: Results) -> str:
    """Return the size of the smallest test: "2,000 images", "100 bags"; "" where none says."""
    n, unit = images_tested(results), "bag" if results.unit == "bag" else "image"
    return f"{n:,} {unit}{'s' if n != 1 else ''}" if n else ""


def allowed(results: Results) -> float:
    """Return how much of the metric may be lost, in its own unit: `margin` is in points for a share
    of 1."""
    return results.margin / 100 if is_share(results.measure) else results.margin


def _by_seed(row: ArmResults) -> Quantities:
    """Return what is compared beside the metric."""
    return {
        **row.by_seed,
        "train_energy": row.train_energy_j.seeds,
        "train_energy_with_reuse": row.train_energy_with_reuse_j.seeds,
        "inference_energy": row.inference_energy_j.seeds,
    }


def _payback(own: Quantities, base: Quantities, use: Ratio | None) -> Paybacks | None:
    """Break-even images against the baseline, without and with what each builds on. None where a
    cost is not known."""
    alone = _paid_back(own, base, "train_energy", use)
    line = _paid_back(own, base, "train_energy_with_reuse", use)
    return Paybacks(own=alone, with_reuse=line) if alone and line else None


def _paid_back(own: Quantities, base: Quantities, cost: str, use: Ratio | None) -> Payback | None:
    """Return when making an arm at that cost is paid back; the range is over seeds.

    Where the interval does not show that one image costs less or more, dividing by that difference
    would divide by noise.
    """
    make, make_b, infer, infer_b = (
        own[cost],
        base[cost],
        own["inference_energy"],
        base["inference_energy"],
    )
    means = [stats.summary(x).mean for x in (make, make_b, infer, infer_b)]
    known = [m for m in means if m is not None]
    if len(known) < len(means):
        return None
    if not formatting.shown(use):
        return NOT_SHOWN
    out = stats.payback(known[0] - known[1], known[3] - known[2])
    seeds = [s for s in make if s in make_b and s in infer and s in infer_b]
    single = [stats.payback(make[s] - make_b[s], infer_b[s] - infer[s]) for s in seeds]
    agree = len(single) > 1 and all(x.verdict == out.verdict for x in single)
    images = [x.images for x in single if x.images is not None] if agree else []
    ends = {"low": min(images, default=None), "high": max(images, default=None)}
    return out.model_copy(update={**ends, "seeds_agree": agree})


def to_target(arm: Arm, target: float | None, lower: bool) -> ToTarget | None:
    """Return the joules until the metric reached the baseline's final mean and stayed there, by
    finished seed. None without a learning curve."""
    if target is None:
        return None
    sign = -1.0 if lower else 1.0
    curves = {s: c for s, r in arm.done.items() if len(c := curve(r)) > 1}
    spent = {
        s: stats.energy_to([(j, sign * y) for j, y in c], sign * target) for s, c in curves.items()
    }
    if not spent:
        return None
    reached = {s: v for s, v in spent.items() if v is not None}
    s = stats.summary(reached)
    missed = len(spent) - len(reached)
    return ToTarget(mean=s.mean, std=s.std, n=s.n, target=target, not_reached=missed)


def curve(run: SeedRun) -> Curve:
    """Return (joules spent so far, metric) over the attempts that led to a result: a broken one's
    come first."""
    points: Curve = []
    before = 0.0
    for attempt in run.chain:
        points += [(before + j, y) for j, y in attempt.curve]
        before += attempt.training_energy_j.value or 0.0
    return points


def thin(points: Curve, most: int = 100) -> Curve:
    """Return at most about `most` of the points, evenly taken, the last one always."""
    return (
        points[:: max(1, -(-len(points) // most))][: most - 1] + points[-1:]
        if len(points) > most
        else points
    )


def full_cycle(row: ArmResults, served: float) -> Cycle:
    """Joules to make the model once and use it on `served` images, with what it reuses charged
    whole and shared.

    What others made, at a cost nobody knows, is in none of these: `uses` names it.
    """
    make, infer, base = row.train_energy_j.value, row.inference_energy_j.value, row.base_reuse
    reused, shared = (base.whole_j.value, base.shared_j) if base else (0.0, 0.0)
    serve = None if infer is None else infer * served
    known = make is not None and serve is not None
    return Cycle(
        served=served,
        make_j=make,
        reuse_whole_j=reused,
        reuse_shared_j=shared,
        serve_j=serve,
        total_whole_j=math.fsum((make or 0.0, reused or 0.0, serve or 0.0)) if known else None,
        total_shared_j=math.fsum((make or 0.0, shared or 0.0, serve or 0.0)) if known else None,
        wh_per_1000_images=None if infer is None else infer * 1000 / 3600,
    )


def sci(
    make: float | None,
    grams: float | None,
    infer: float | None,
    images_per_s: float | None,
    last: RunSummary | None,
) -> Sci:
    """Software Carbon Intensity (ISO/IEC 21031) of one inference: ((E × I) + M) / R with R = one
    image; PUE is in E.

    make, grams: of the training. infer: joules per image. I is the mean the arm's own records were
    priced with. M is None where no embodied carbon was given: not counted.
    """
    intensity = grams / make * pricing.JOULES_PER_KWH if make and grams is not None else None
    m = last.embodied_g(1 / images_per_s) if last and images_per_s else None
    per_image = None
    if infer is not None and intensity is not None:
        per_image = infer / pricing.JOULES_PER_KWH * intensity + (m or 0.0)
    return Sci(
        e_kwh=None if infer is None else infer / pricing.JOULES_PER_KWH,
        i_g_per_kwh=intensity,
        m_g=m,
        r="one image",
        g_per_image=per_image,
    )
