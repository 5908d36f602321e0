"""Readings of several runs as one: the mean over seeds, or the sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import Reading
from greenvis.report import stats
from greenvis.report.estimates import Estimate


def mean_reading(
    readings: Iterable[Reading],
    by_seed: Mapping[int, float | None] | None = None,
    missing: str = "",
) -> Estimate:
    """Return the mean over seeds, bound by bound.

    Args:
        readings: one per seed.
        by_seed: values to go with it.
        missing: the reason to give where none is known, in place of the readings' own.
    """
    items = list(readings)
    known = [r for r in items if r.value is not None]
    values = {str(s): v for s, v in (by_seed or {}).items() if v is not None}
    more: dict[str, Any] = {} if by_seed is None else {"by_seed": values}
    if not known:
        reasons = "; ".join(sorted({r.reason for r in items if r.reason}))
        reason = missing or reasons or "no finished run"
        return Estimate(value=None, low=None, high=None, provenance=None, reason=reason, **more)
    n, total = len(known), pricing.add(known)
    s = stats.summary({i: r.value for i, r in enumerate(known) if r.value is not None})
    more |= {"reason": total.reason} if total.reason else {}
    return Estimate(
        value=s.mean,
        low=(total.low or 0) / n,
        high=(total.high or 0) / n,
        provenance=total.provenance,
        method=total.method,
        std=s.std,
        n=n,
        **more,
    )


def sum_reading(readings: Iterable[Reading]) -> Estimate:
    """Return a sum; 0 for nothing at all."""
    items = list(readings)
    if not items:
        return Estimate(value=0.0, low=0.0, high=0.0, provenance=None)
    r = pricing.add(items)
    known = r.value is not None
    return Estimate(
        value=r.value, low=r.low, high=r.high, provenance=r.provenance if known else None
    )
