"""The statistics of a report: spread over seeds, simultaneous intervals of ratios and differences
to the baseline, payback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from greenvis.report.estimates import Difference, Payback, Ratio, Summary
from greenvis.report.simultaneous import ALPHA, quantile

LEAST = 2  # seeds that tell a scatter
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


@dataclass(frozen=True)
class Pooled:
    """Groups of seeds with one variance, pooled over them, against one of them.

    Attributes:
        means: By group.
        sizes: Seeds by group.
        std: Pooled standard deviation; None where no group has two seeds.
        base: The group that the others are compared with.
    """

    means: dict[str, float]
    sizes: dict[str, int]
    std: float | None
    base: str

    @classmethod
    def of(cls, groups: Mapping[str, Seeds], base: str) -> Pooled:
        """Return what is known of groups of values by seed, those without any left out."""
        known = {a: list(seeds.values()) for a, seeds in groups.items() if seeds}
        means = {a: math.fsum(v) / len(v) for a, v in known.items()}
        sizes = {a: len(v) for a, v in known.items()}
        df = sum(sizes.values()) - len(sizes)
        squares = math.fsum((x - means[a]) ** 2 for a, v in known.items() for x in v)
        return cls(means, sizes, math.sqrt(squares / df) if df else None, base)

    @cached_property
    def rivals(self) -> set[str]:
        """The groups that have an interval: those of two seeds, where the base has two as well."""
        if self.sizes.get(self.base, 0) < LEAST:
            return set()
        return {a for a, n in self.sizes.items() if a != self.base and n >= LEAST}

    @cached_property
    def _known(self) -> dict[float, float]:
        return {}  # quantiles, by how many seeds more

    def quantile(self, more: float = 0) -> float:
        """Return Dunnett's quantile with as many seeds more in every group; with infinitely many,
        that of a known variance and the sizes there are."""
        if more not in self._known:
            extra = 0 if math.isinf(more) else more
            sizes = {a: n + extra for a, n in self.sizes.items()}
            df = more if math.isinf(more) else sum(sizes.values()) - len(sizes)
            base = sizes[self.base]
            shares = [sizes[a] / (sizes[a] + base) for a in self.rivals]
            self._known[more] = quantile(df, shares)
        return self._known[more]

    def half(self, group: str, more: int = 0) -> float:
        """Return how far the interval of a group's difference reaches to each side, Dunnett's.

        Args:
            group: One of `rivals`.
            more: Seeds more in every group, were the scatter to stay as it is.
        """
        n, base = self.sizes[group] + more, self.sizes[self.base] + more
        return self.quantile(more) * (self.std or 0.0) * math.sqrt(1 / n + 1 / base)

    def more_seeds(self, group: str, room: float, least: float = 0.0) -> int | None:
        """Return about how many more seeds would make an interval narrower than `room` to each
        side; None for more than `MOST_SEEDS`, or where `least`, below which none is, is wider."""
        if least >= room or self.half(group, MOST_SEEDS) >= room:
            return None
        low, high = 0, MOST_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.half(group, middle) < room else (middle, high)
        return high


def differences(
    groups: Mapping[str, Seeds],
    base: str,
    margin: float = 0.0,
    lower_is_better: bool = False,
    least: float = 0.0,
) -> dict[str, Difference]:
    """Return the difference of each group's mean to the base's, with intervals that hold for all
    groups together with 95 % (`Pooled.half`), and what each decides (`decide`).

    Args:
        groups: Values by seed.
        base: The group the others are compared with.
        margin: How much may be lost.
        lower_is_better: Whether less is more.
        least: The half-width below which no interval is: what one image of the test is worth.
    """
    pooled, out = Pooled.of(groups, base), {}
    if base not in pooled.means:
        return {}
    for a in pooled.means:
        if a == base:
            continue
        mean, n = pooled.means[a] - pooled.means[base], pooled.sizes[a]
        d = Difference(mean=mean, low=None, high=None, n=n)
        if a in pooled.rivals:
            half = max(pooled.half(a), least)
            d = d.model_copy(update={"low": mean - half, "high": mean + half})
            verdict, more = decide(d, margin, lower_is_better), None
            if verdict == OPEN:
                room = abs((-mean if lower_is_better else mean) + margin)
                more = pooled.more_seeds(a, room, least)
            d = d.model_copy(update={"verdict": verdict, "more_seeds": more})
        out[a] = d
    return out


def ratios(
    groups: Mapping[str, Seeds], base: str, scatter: Mapping[str, float] | None = None
) -> dict[str, Ratio]:
    """Return each group ÷ the base: geometric means, and intervals as of `differences` on the
    logarithm.

    Args:
        groups: Values by seed. What is not above 0 has no logarithm: a group that holds 0 is 0
            times the base, without an interval.
        base: The group the others are compared with.
        scatter: By group, the standard error of one seed's value over the many readings it is the
            median of, as a share of it. The interval is then that of the readings, or that of the
            seeds where these scatter wider than their readings say.
    """
    logs = {
        a: {s: math.log(v) for s, v in seeds.items()}
        for a, seeds in groups.items()
        if seeds and min(seeds.values()) > 0
    }
    if base not in logs:
        return {}
    pooled, out = Pooled.of(logs, base), {}
    for a, d in differences(logs, base).items():
        low, high = d.low, d.high
        if low is not None and high is not None and scatter:
            half = max((high - low) / 2, _over_readings(pooled, a, scatter))
            low, high = d.mean - half, d.mean + half
        out[a] = Ratio(
            ratio=_exp(d.mean),
            low=None if low is None else _exp(low),
            high=None if high is None else _exp(high),
            n=d.n,
        )
    for a, seeds in groups.items():
        if seeds and min(seeds.values()) == 0:
            out[a] = Ratio(ratio=0.0, low=None, high=None, n=len(seeds))
    return out


def _over_readings(pooled: Pooled, group: str, scatter: Mapping[str, float]) -> float:
    """Return the half-width of a difference over the readings themselves, so many that their
    variance is known."""
    n = pooled.sizes
    own, control = (scatter.get(a, 0.0) / math.sqrt(n[a]) for a in (group, pooled.base))
    return pooled.quantile(math.inf) * math.hypot(own, control)


def ratio(arm: Seeds, base: Seeds) -> Ratio | None:
    """Return arm ÷ base as the only comparison there is; None where it is not defined."""
    return ratios({"base": base, "arm": arm}, "base").get("arm")


def means(groups: Mapping[str, Seeds]) -> dict[str, tuple[float, float, float]]:
    """Return the mean of each group of two seeds or more, with intervals that hold for all together
    with 95 %, the variance pooled."""
    known = {a: seeds for a, seeds in groups.items() if len(seeds) >= LEAST}
    if not known:
        return {}
    pooled = Pooled.of(known, "")
    c = quantile(sum(pooled.sizes.values()) - len(known), [0.0] * len(known))
    out = {}
    for a, mean in pooled.means.items():
        half = c * (pooled.std or 0.0) / math.sqrt(pooled.sizes[a])
        out[a] = (mean, mean - half, mean + half)
    return out


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the interval of one mean by Student's t; (None, None) for fewer than two values."""
    each = means({"": dict(enumerate(values))})
    return each[""][1:] if each else (None, None)


def quotient(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Return the interval of a ratio of two means by Fieller's theorem (1954), 95 %.

    Args:
        pairs: (numerator, denominator) of each seed.

    Returns:
        Both ends; the lower alone of a positive ratio whose denominator may be 0, so that there is
        no upper one; (None, None) for fewer than two seeds or where nearly any ratio may be true.
    """
    n = len(pairs)
    if n < LEAST:
        return None, None
    top, below = (math.fsum(column) / n for column in zip(*pairs, strict=True))
    share = quantile(n - 1, [0.0]) ** 2 / (n * (n - 1))

    def spread(i: int, j: int) -> float:
        means = (top, below)
        return share * math.fsum((p[i] - means[i]) * (p[j] - means[j]) for p in pairs)

    a, b, c = below**2 - spread(1, 1), top * below - spread(0, 1), top**2 - spread(0, 0)
    root = b**2 - a * c
    if root < 0 or a == 0 or below <= 0:
        return None, None
    ends = sorted((b + sign * math.sqrt(root)) / a for sign in (-1, 1))
    if a > 0:
        return ends[0], ends[1]
    return (ends[1] if top / below >= ends[1] else None), None


def proportion(share: float, n: int) -> tuple[float, float]:
    """Return the interval of a share that n images of a test let one see (Clopper and Pearson,
    1934)."""
    from scipy.special import betaincinv

    hits = min(max(share, 0.0), 1.0) * n
    low = float(betaincinv(hits, n - hits + 1, ALPHA / 2)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - ALPHA / 2)) if hits < n else 1.0
    return low, high


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Pearson's correlation of three pairs or more; None where one side does not vary."""
    if len(pairs) < 3:
        return None
    a, b = ([p[i] - math.fsum(q[i] for q in pairs) / len(pairs) for p in pairs] for i in (0, 1))
    scale = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else None


Verdict = Literal["keeps", "loses", "not yet decided"]
OPEN: Verdict = "not yet decided"


def decide(d: Difference, margin: float, lower_is_better: bool = False) -> Verdict:
    """Return the verdict on a difference: does an arm keep the metric, at most `margin` below the
    baseline? "keeps" where the whole interval lies at or above -margin, "loses" where the whole
    interval lies below it, else "not yet decided"."""
    if d.low is None or d.high is None:
        return OPEN
    sign = -1 if lower_is_better else 1
    worst, best = sorted((sign * d.low, sign * d.high))
    return "keeps" if worst >= -margin else "loses" if best < -margin else OPEN


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
