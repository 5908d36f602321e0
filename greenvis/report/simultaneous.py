"""How many standard errors simultaneous intervals reach: Dunnett's quantiles, by quadrature, so
that the same results are the same to the last digit (scipy's own are drawn at random)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

ALPHA = 0.05


def quantile(df: float, shares: Sequence[float]) -> float:
    """Return c such that all |T_i| <= c with 95 %: T_i of arms that share one control and one
    variance (Dunnett, 1955, eq. 3).

    Args:
        df: Degrees of freedom of the pooled variance; infinite where it is known.
        shares: By arm, which part of the variance of its difference is the control's:
            n_i ÷ (n_i + n_0). All 0: means that share nothing but the variance.

    Returns:
        The quantile; Student's own for one arm.
    """
    return _quantile(df, tuple(sorted(Counter(round(s, 12) for s in shares).items())))


@lru_cache(maxsize=4096)
def _quantile(df: float, shares: tuple[tuple[float, int], ...]) -> float:
    low, many = _student(df, 1), sum(count for _, count in shares)
    if many <= 1:
        return low
    high = _student(df, many) + 1e-9  # Bonferroni's
    below, above = _inside(low, df, shares), _inside(high, df, shares)
    c, side = high, 0
    for _ in range(100):  # regula falsi, the end that stays put halved (Illinois)
        c = (low * above - high * below) / (above - below)
        value = _inside(c, df, shares)
        if abs(value) < 1e-11 or high - low < 1e-11 * high:
            return c
        if value < 0:
            low, below = c, value
            above, side = (above / 2, -1) if side == -1 else (above, -1)
        else:
            high, above = c, value
            below, side = (below / 2, 1) if side == 1 else (below, 1)
    return c


def _student(df: float, arms: int) -> float:
    from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

    p = 1 - ALPHA / (2 * arms)
    return float(ndtri(p) if math.isinf(df) else stdtrit(df, p))


def _inside(c: float, df: float, shares: tuple[tuple[float, int], ...]) -> float:
    """Return the probability that all |T_i| <= c, less 95 %.

    Given the control z and the ratio s of the estimated to the true deviation the T_i are
    independent; both are integrated by the trapezoid rule, whose error vanishes for such densities.
    """
    import numpy as np
    from scipy.special import ndtr

    z = np.linspace(-8.0, 8.0, 97)
    weight_z = np.exp(-z * z / 2)
    log_s, weight_s = np.zeros(1), np.ones(1)
    if not math.isinf(df):  # density of log s, s² = χ² ÷ df
        least = max(-6.0 - 24.0 / df, -14.0 / math.sqrt(df))
        log_s = np.linspace(least, math.log1p(9.0 / math.sqrt(df)), 241)
        weight_s = np.exp(df * (log_s - np.expm1(2 * log_s) / 2))
    every = np.ones((len(log_s), len(z)))
    reach = c * np.exp(log_s)[:, None]
    for share, count in shares:
        own = math.sqrt(max(1 - share, 1e-12))
        shift = math.sqrt(share) * z[None, :]
        every *= (ndtr((reach + shift) / own) - ndtr((shift - reach) / own)) ** count
    inner = every @ weight_z / weight_z.sum()
    return float(inner @ weight_s / weight_s.sum()) - (1 - ALPHA)
