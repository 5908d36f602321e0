"""The statistics of a report: spread over seeds, intervals of ratios and differences paired by
seed, payback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from greenvis.report.estimates import Difference, Payback, Ratio, Summary

ALPHA = 0.05
MOST_SEEDS = 1000  # where more would be needed to decide, none is named

Seeds = Mapping[Any, float]  # seed -> value


def summary(values: Seeds) -> Summary:
    """Return mean, sample standard deviation (None for fewer than two) and number of seeds."""
    v = list(values.values())
    if not v:
        return Summary(mean=None, std=None, n=0)
    mean = math.fsum(v) / len(v)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in v) / (len(v) - 1)) if len(v) > 1 else None
    return Summary(mean=mean, std=std, n=len(v))


def ratio(arm: Seeds, base: Seeds, comparisons: int = 1) -> Ratio | None:
    """Return arm ÷ base over the seeds both have: the geometric mean and its interval (see
    `interval`), on the logarithm.

    Pairing cancels what both share (the host, its coefficients, the seed). The geometric mean makes
    "2 times less" and "half" the same statement. Without a common seed it is the ratio of means,
    with no interval. None if not defined.
    """
    pairs = [(arm[s], base[s]) for s in arm if s in base]
    n = len(pairs)
    if not pairs:
        pairs = [
            (m, b)
            for m, b in [(summary(arm).mean, summary(base).mean)]
            if m is not None and b is not None
        ]
    if not pairs or any(b <= 0 or a < 0 for a, b in pairs):
        return None
    if min(a for a, _ in pairs) == 0:
        return Ratio(ratio=0.0, low=None, high=None, n=n)
    logs = [math.log(a / b) for a, b in pairs]
    low, high = interval(logs, comparisons)
    mean = math.exp(math.fsum(logs) / len(logs))
    return Ratio(
        ratio=mean,
        low=None if low is None else _exp(low),
        high=None if high is None else _exp(high),
        n=n,
    )


def difference(
    arm: Seeds,
    base: Seeds,
    comparisons: int = 1,
    margin: float = 0.0,
    lower_is_better: bool = False,
) -> Difference | None:
    """Return arm − base over the seeds both have: the mean, its interval (see `interval`), and
    what that decides (see `decide`). None without a common seed."""
    diffs = [arm[s] - base[s] for s in arm if s in base]
    if not diffs:
        return None
    low, high = interval(diffs, comparisons)
    d = Difference(mean=math.fsum(diffs) / len(diffs), low=low, high=high, n=len(diffs))
    verdict, more = decide(d, margin, comparisons, lower_is_better)
    return d.model_copy(update={"verdict": verdict, "more_seeds": more})


def interval(values: Sequence[float], comparisons: int = 1) -> tuple[float | None, float | None]:
    """Return the interval of a mean by Student's t, (None, None) for fewer than two values.

    Each of `comparisons` intervals is drawn at 1 - 0.05 ÷ comparisons (Bonferroni): all together
    hold with 95 %.
    """
    s = summary(dict(enumerate(values)))
    if s.std is None or s.mean is None:
        return None, None
    half = quantile(len(values), comparisons) * s.std / math.sqrt(len(values))
    return s.mean - half, s.mean + half


def quantile(n: int, comparisons: int = 1) -> float:
    """Return how many standard errors of n values an interval reaches to each side."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(n - 1, 1 - ALPHA / (2 * max(1, comparisons))))


Verdict = Literal["keeps", "loses", "not yet decided"]


def decide(
    d: Difference, margin: float, comparisons: int = 1, lower_is_better: bool = False
) -> tuple[Verdict, int | None]:
    """Return the verdict on a difference, and how many more seeds would decide it: does an arm keep
    the metric, at most `margin` below the baseline?

    verdict: "keeps" where the whole interval lies at or above -margin, "loses" where the whole
    interval lies below it, else "not yet decided". more_seeds: about how many more would decide it,
    were mean and scatter to stay as they are; None where it is decided, or where one seed tells no
    scatter, or more than `MOST_SEEDS` would be needed.
    """
    sign = -1 if lower_is_better else 1
    if d.low is None or d.high is None:
        return "not yet decided", None
    worst, best = sorted((sign * d.low, sign * d.high))
    if worst >= -margin or best < -margin:
        return ("keeps" if worst >= -margin else "loses"), None
    std = (best - worst) / 2 * math.sqrt(d.n) / quantile(d.n, comparisons)
    room = abs(sign * d.mean + margin)
    enough = (
        n
        for n in range(d.n + 1, MOST_SEEDS + 1)
        if quantile(n, comparisons) * std / math.sqrt(n) < room
    )
    return "not yet decided", next((n - d.n for n in enough), None)


def _exp(value: float) -> float:
    return math.exp(max(-700.0, min(700.0, value)))


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names no other point beats: (cost, gain), less cost and more gain are better. In
    order of cost."""
    front, best = [], -math.inf
    for name, (_, gain) in sorted(points.items(), key=lambda kv: (kv[1][0], -kv[1][1], kv[0])):
        if gain > best:
            front.append(name)
            best = gain
    return front


def payback(extra_j: float, saved_j: float) -> Payback:
    """Return after how many images a dearer training is paid back by a cheaper inference (or the
    reverse).

    extra_j: making it, arm − baseline, joules. saved_j: one image, baseline − arm, joules. verdict:
    "at once" (cheaper to make and not dearer to use), "pays back" (after `images`), "ahead until"
    (cheaper to make, dearer to use), "never".
    """
    if extra_j <= 0:
        if saved_j >= 0:
            return Payback(verdict="at once", images=0.0)
        return Payback(verdict="ahead until", images=extra_j / saved_j)
    if saved_j > 0:
        return Payback(verdict="pays back", images=extra_j / saved_j)
    return Payback(verdict="never", images=None)


def energy_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the energy at which the curve (energy, gain) first reaches `target` and stays there;
    None if it does not."""
    reached = None
    for spent, gain in curve:
        if gain < target:
            reached = None
        elif reached is None:
            reached = spent
    return reached
