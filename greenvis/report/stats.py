"""The statistics of a report: spread over seeds, ratios and differences paired by seed, Pareto front, payback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ALPHA = 0.05

Seeds = Mapping[Any, float]  # seed -> value


def summary(values: Seeds) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two) and number of seeds."""
    v = list(values.values())
    if not v:
        return {"mean": None, "std": None, "n": 0}
    mean = math.fsum(v) / len(v)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else None
    return {"mean": mean, "std": std, "n": len(v)}


def ratio(arm: Seeds, base: Seeds) -> dict[str, Any] | None:
    """Return arm ÷ base: the geometric mean over the seeds both have, with the lowest and highest single seed.

    Pairing cancels what both share (the host, its coefficients, the seed). The geometric mean makes "2 times less" and
    "half" the same statement. Without a common seed it is the ratio of means, with no spread. None if not defined.
    """
    pairs = [(arm[s], base[s]) for s in arm if s in base]
    paired = bool(pairs)
    if not pairs:
        pairs = [(m, b) for m, b in [(summary(arm)["mean"], summary(base)["mean"])] if m is not None and b is not None]
    if not pairs or any(b <= 0 or a < 0 for a, b in pairs):
        return None
    ratios = [a / b for a, b in pairs]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if min(ratios) > 0 else 0.0
    spread = paired and len(ratios) > 1
    out = {"ratio": mean, "low": min(ratios) if spread else None, "high": max(ratios) if spread else None}
    p = t_test([math.log(r) for r in ratios]) if spread and min(ratios) > 0 else None
    return {**out, "n": len(ratios) if paired else 0, "p_value": p}


def difference(arm: Seeds, base: Seeds) -> dict[str, Any] | None:
    """Return arm − base over the seeds both have: mean, 95 % confidence interval of the mean, p of a paired t test."""
    diffs = [arm[s] - base[s] for s in arm if s in base]
    if not diffs:
        return None
    s = summary(dict(enumerate(diffs)))
    half = None
    if s["std"] is not None:
        from scipy.special import stdtrit

        half = float(stdtrit(len(diffs) - 1, 1 - ALPHA / 2)) * s["std"] / math.sqrt(len(diffs))
    low, high = (None, None) if half is None else (s["mean"] - half, s["mean"] + half)
    return {"mean": s["mean"], "low": low, "high": high, "n": len(diffs), "p_value": t_test(diffs)}


def t_test(diffs: Sequence[float]) -> float | None:
    """Return the two-sided p of "the mean difference is 0" (Student's t, paired); None for fewer than two pairs."""
    s = summary(dict(enumerate(diffs)))
    if s["std"] is None:
        return None
    scale = max(abs(d) for d in diffs)
    if s["std"] <= 1e-12 * scale or scale == 0:  # the same difference at every seed: the test is not defined
        return 1.0 if scale == 0 else None
    from scipy.special import stdtr  # what scipy.stats.ttest_rel comes to, without its second of import

    return float(2 * stdtr(len(diffs) - 1, -abs(s["mean"]) / (s["std"] / math.sqrt(len(diffs)))))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p values adjusted for the number of comparisons made (Holm, 1979); None stays None."""
    known = sorted((p, k) for k, p in p_values.items() if p is not None)
    out: dict[str, float | None] = dict.fromkeys(p_values)
    worst = 0.0
    for i, (p, key) in enumerate(known):
        worst = max(worst, min(1.0, p * (len(known) - i)))
        out[key] = worst
    return out


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names no other point beats: (cost, gain), less cost and more gain are better. In order of cost."""
    front, best = [], -math.inf
    for name, (_, gain) in sorted(points.items(), key=lambda kv: (kv[1][0], -kv[1][1], kv[0])):
        if gain > best:
            front.append(name)
            best = gain
    return front


def payback(extra_j: float, saved_j: float) -> dict[str, Any]:
    """Return after how many images a dearer training is paid back by a cheaper inference (or the reverse).

    extra_j: making it, arm − baseline, joules. saved_j: one image, baseline − arm, joules. verdict: "at once" (cheaper
    to make and not dearer to use), "pays back" (after `images`), "ahead until" (cheaper to make, dearer to use), "never".
    """
    if extra_j <= 0:
        if saved_j >= 0:
            return {"verdict": "at once", "images": 0.0}
        return {"verdict": "ahead until", "images": extra_j / saved_j}
    return {"verdict": "pays back", "images": extra_j / saved_j} if saved_j > 0 else {"verdict": "never", "images": None}


def energy_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the energy at which the curve (energy, gain) first reaches `target` and stays there; None if it does not."""
    reached = None
    for spent, gain in curve:
        if gain < target:
            reached = None
        elif reached is None:
            reached = spent
    return reached
