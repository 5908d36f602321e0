"""Seed runs to the results of a report: one plain dict, the same for the same records wherever they lie."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from greenvis import price
from greenvis.errors import BadInput, nearest
from greenvis.report import arms as arms_
from greenvis.report import provenance, stats
from greenvis.report.arms import Arm
from greenvis.report.groups import SeedRun

SCHEMA = 1
USAGE_IMAGES = 1_000_000  # the usage at which the full cycle is stated
RESERVED = (*arms_.PLAIN, "status", "seeds", "attempts", "uses", "spent", "latency_ms", "wall_s", "train_flops")


def results(
    groups: list[SeedRun],
    notes: list[str],
    *,
    baseline: str | None = None,
    metric: str = "accuracy",
    grid: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the results: {"schema", "name", "baseline", "metric", "arms", "totals", "environment", …}.

    grid: a carbon intensity that replaces the recorded ones; it changes grams and nothing else.
    Raises BadInput for an unknown baseline or a metric that names something else.
    """
    if metric in RESERVED or metric.endswith(("_j", "_g")):
        raise BadInput(f"metric '{metric}' is a cost the report shows anyway; name what is gained, such as 'accuracy'")
    listed = to_arms(groups)
    base = _baseline(baseline, listed)
    users = Counter(k for a in listed for r in a.done.values() for k in arms_.uses_of(r))
    table = {a.label: arms_.numbers(a, metric, grid, users) for a in listed}
    if all(t[metric]["n"] == 0 for t in table.values()) and any(a.done for a in listed):
        _unknown_metric(metric, listed)
    _compare(table, {a.label: a for a in listed}, base, metric)
    for arm in listed:
        table[arm.label]["curve"] = {str(s): [list(p) for p in thin(curve(r))] for s, r in arm.done.items()}
        table[arm.label]["sci"] = _sci(table[arm.label])
        table[arm.label]["full_cycle"] = _full_cycle(table[arm.label])
    names = sorted({g.name for g in groups})
    return {
        "schema": SCHEMA,
        "name": names[0]
        if len(names) == 1
        else " + ".join(names[:3]) + (f" + {len(names) - 3} more" if len(names) > 3 else ""),
        "baseline": base,
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "arms": table,
        "order": _order(listed, base),
        "totals": _totals(listed, grid),
        "incomplete": _incomplete(listed),
        **provenance.describe(listed, grid, notes),
    }


def lower_is_better(metric: str) -> bool:
    """Return whether less of the metric is better, by its name ("loss", "val_error", "forgetting")."""
    return metric.lower().rsplit("_", 1)[-1] in arms_.LOWER_IS_BETTER


def to_arms(groups: list[SeedRun]) -> list[Arm]:
    """Group seed runs into arms. A recipe's arm keeps its newest inputs; a tracked run is an arm of its own."""
    kinds: dict[tuple[str, str], list[SeedRun]] = defaultdict(list)
    tracked: dict[str, list[SeedRun]] = defaultdict(list)
    for g in groups:
        (tracked[g.name] if g.tracked else kinds[g.name, g.arm]).append(g)
    arms: list[Arm] = []
    names = Counter(arm for _, arm in kinds)
    for (name, arm), runs in sorted(kinds.items()):
        newest = max(runs, key=lambda r: (r.newest_s, r.inputs)).inputs
        label = arm if names[arm] == 1 else f"{name}/{arm}"
        arms.append(Arm(label, [r for r in runs if r.inputs == newest], [r for r in runs if r.inputs != newest]))
    taken = {a.label for a in arms}
    for name, runs in sorted(tracked.items()):
        for run in sorted(runs, key=lambda r: (r.newest_s, r.inputs)):
            label, k = name, 1
            while label in taken:
                k += 1
                label = f"{name} ({k})"
            taken.add(label)
            arms.append(Arm(label, [run]))
    return arms


def _baseline(asked: str | None, listed: list[Arm]) -> str | None:
    """The baseline asked for, else an arm called "baseline", else none."""
    labels = [a.label for a in listed]
    if asked is not None and asked not in labels:
        raise BadInput(f"no arm '{asked}' to be the baseline{nearest(asked, labels)}")
    return asked if asked is not None else ("baseline" if "baseline" in labels else None)


def _unknown_metric(metric: str, listed: list[Arm]) -> None:
    facts = {
        k
        for a in listed
        for r in a.done.values()
        for k, v in (r.done.facts if r.done else {}).items()
        if isinstance(v, (int, float)) and k not in RESERVED
    }
    if metric != "accuracy":  # a tracked run need not have an accuracy; another metric was asked for on purpose
        raise BadInput(f"no finished run has a fact or a log named '{metric}'{nearest(metric, facts)}")


def _order(listed: list[Arm], base: str | None) -> list[str]:
    """The order of tables and figures: the baseline, then the arms as they were first started."""
    first = {a.label: min(x.start_s for r in a.runs for x in r.attempts) for a in listed}
    return sorted(first, key=lambda label: (label != base, first[label], label))


def _compare(table: dict[str, dict[str, Any]], arms: dict[str, Arm], base: str | None, metric: str) -> None:
    """Add to each arm its ratios to the baseline, paired by seed, and when it pays back."""
    for label in table:
        table[label]["vs_baseline"] = None
    if base is None or not arms[base].done:
        return
    b = arms[base]
    target = table[base][metric]["mean"]
    for label, arm in arms.items():
        table[label]["energy_to_baseline_j"] = _energy_to(arm, target, lower_is_better(metric))
        if label == base or not arm.done:
            continue
        quantities = {
            "train_energy": lambda r: arms_.making(r).value,
            "total_energy": lambda r: arms_.everything(r).value,
            "train_energy_with_reuse": _with_reuse,
            "inference_energy": lambda r: arms_.inference([r])["value"],
            "train_flops": arms_.train_flops,
            "wall": arms_.wall,
            "latency_p50": lambda r: (arms_.latency([r]) or {}).get("p50"),
            **{k: arms_.fact(k) for k in arms_.PLAIN},
        }
        ratios = {k: stats.ratio(arms_.per_seed(arm, f), arms_.per_seed(b, f)) for k, f in quantities.items()}
        gain = stats.difference(
            arms_.per_seed(arm, lambda r: arms_.score(r, metric)), arms_.per_seed(b, lambda r: arms_.score(r, metric))
        )
        table[label]["vs_baseline"] = {**ratios, metric: gain, "payback": _payback(arm, b)}
    for key in ("train_energy", metric):
        rows = {k: t["vs_baseline"][key] for k, t in table.items() if t["vs_baseline"] and t["vs_baseline"][key]}
        for label, p in stats.holm({k: v["p_value"] for k, v in rows.items()}).items():
            rows[label]["p_adjusted"] = p


def _with_reuse(run: SeedRun) -> float | None:
    uses = [arms_.use_energy(u) for u in arms_.uses_of(run).values()]
    if any(u.value is None for u in uses):
        return None
    return price.add([arms_.making(run), *uses]).value


def _payback(arm: Arm, base: Arm) -> dict[str, Any] | None:
    """Break-even images against the baseline, without and with what each builds on; the range is over seeds."""
    infer, infer_b = arms_.inference_by_seed(arm), arms_.inference_by_seed(base)
    out: dict[str, Any] = {}
    for key, cost in (("own", lambda r: arms_.making(r).value), ("with_reuse", _with_reuse)):
        make, make_b = arms_.per_seed(arm, cost), arms_.per_seed(base, cost)
        means = [stats.summary(x)["mean"] for x in (make, make_b, infer, infer_b)]
        if any(m is None for m in means):
            return None
        out[key] = stats.payback(means[0] - means[1], means[3] - means[2])
        seeds = [s for s in make if s in make_b and s in infer and s in infer_b]
        single = [stats.payback(make[s] - make_b[s], infer_b[s] - infer[s]) for s in seeds]
        agree = len(single) > 1 and all(x["verdict"] == out[key]["verdict"] for x in single)
        images = [x["images"] for x in single if x["images"] is not None]
        out[key] |= {"low": min(images) if agree and images else None, "high": max(images) if agree and images else None}
        out[key]["seeds_agree"] = agree if len(single) > 1 else None
    return out


def _energy_to(arm: Arm, target: float | None, lower: bool) -> dict[str, Any] | None:
    """Joules until the metric reached the baseline's final mean and stayed there, by finished seed."""
    if target is None:
        return None
    sign = -1.0 if lower else 1.0
    found = {
        s: stats.energy_to([(j, sign * y) for j, y in curve(r)], sign * target)
        for s, r in arm.done.items()
        if len(curve(r)) > 1
    }
    reached = {s: v for s, v in found.items() if v is not None}
    return {**stats.summary(reached), "target": target, "not_reached": len(found) - len(reached)} if found else None


def curve(run: SeedRun) -> list[tuple[float, float]]:
    """Return (joules spent so far, metric) over all attempts at a seed: a crashed one's joules come before the next's."""
    points, before = [], 0.0
    for attempt in run.attempts:
        points += [(before + j, y) for j, y in attempt.curve]
        before += attempt.joules(apart=False).value or 0.0
    return points


def thin(points: list[tuple[float, float]], most: int = 100) -> list[tuple[float, float]]:
    """Return at most about `most` of the points, evenly taken, the last one always."""
    return points[:: max(1, -(-len(points) // most))][: most - 1] + points[-1:] if len(points) > most else points


def _full_cycle(row: dict[str, Any]) -> dict[str, Any]:
    """Joules to make the model once and use it on USAGE_IMAGES images, with its base charged whole and shared."""
    make, infer, reuse = row["train_energy_j"]["value"], row["inference_energy_j"]["value"], row["base_reuse"]
    whole, shared = (reuse["whole_j"]["value"], reuse["shared_j"]) if reuse else (0.0, 0.0)
    serve = None if infer is None else infer * USAGE_IMAGES
    known = make is not None and serve is not None
    return {
        "usage_images": USAGE_IMAGES,
        "make_j": make,
        "reuse_whole_j": whole,
        "reuse_shared_j": shared,
        "serve_j": serve,
        "total_whole_j": math.fsum((make, whole, serve)) if known and whole is not None else None,
        "total_shared_j": math.fsum((make, shared, serve)) if known and shared is not None else None,
        "wh_per_1000_images": None if infer is None else infer * 1000 / 3600,
    }


def _sci(row: dict[str, Any]) -> dict[str, Any]:
    """Software Carbon Intensity (ISO/IEC 21031) of one inference: ((E × I) + M) / R with R = one image; PUE is in E.

    I is the mean the arm's own records were priced with. M is None where no embodied carbon was given: not counted.
    """
    make, grams, infer = row["train_energy_j"]["value"], row["carbon_g"]["value"], row["inference_energy_j"]["value"]
    intensity = grams / make * price.JOULES_PER_KWH if make and grams is not None else None
    known = infer is not None and intensity is not None
    return {
        "e_kwh": None if infer is None else infer / price.JOULES_PER_KWH,
        "i_g_per_kwh": intensity,
        "m_g": None,
        "r": "one image",
        "g_per_image": infer / price.JOULES_PER_KWH * intensity if known and infer and intensity is not None else None,
    }


def _totals(listed: list[Arm], grid: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything these records burnt, whatever became of it."""
    attempts = [a for arm in listed for r in arm.all for a in r.attempts]
    return {
        "energy_j": arms_.sum_reading(a.joules() for a in attempts),
        "carbon_g": arms_.sum_reading(arms_.attempt_grams(a, a.joules(), grid) for a in attempts),
        "unfinished_energy_j": arms_.sum_reading(a.joules() for a in attempts if a.status != "done"),
        "runs": sum(len(arm.all) for arm in listed),
        "attempts": dict(sorted(Counter(a.status for a in attempts).items())),
    }


def _incomplete(listed: list[Arm]) -> list[dict[str, Any]]:
    """Seed runs without a finished attempt, and what they burnt."""
    return [
        {
            "arm": arm.label, "seed": run.seed, "attempts": [a.status for a in run.attempts],
            "reason": next((a.reason for a in reversed(run.attempts) if a.reason), ""),
            "energy_j": arms_.sum_reading([arms_.everything(run)]),
        }
        for arm in listed for run in arm.all if not run.done
    ]  # fmt: skip
