"""Carbon: what a record's header says of grid, building and machine, and the grams that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.errors import BadInput, nearest
from greenvis.meters.grid import constant, lookup
from greenvis.meters.pricing import JOULES_PER_KWH
from greenvis.meters.record import PARTLY_UNKNOWN, Reading

YEAR_S = 365.25 * 86400
EMBODIED_KEYS = ("kg", "lifetime_years", "share")


def header(
    *,
    country: str | None = None,
    intensity: float | None = None,
    pue: float = 1.0,
    embodied: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what a record's header says of carbon: carbon_intensity, pue and, where given,
    embodied. Raises BadInput."""
    if not (isinstance(pue, (int, float)) and 1.0 <= pue < math.inf):
        raise BadInput(
            f"pue is {pue!r}; it is the building's energy over the computers', 1.0 or more (1.1 to "
            "1.6 is usual)"
        )
    if country is not None and intensity is not None:
        raise BadInput(f"give country={country!r} or intensity={intensity!r}, not both")
    out: dict[str, Any] = {
        "carbon_intensity": constant(intensity) if intensity is not None else lookup(country),
        "pue": float(pue),
    }
    if embodied is not None:
        out["embodied"] = _embodied(embodied)
    return out


def _embodied(values: Mapping[str, float]) -> dict[str, float]:
    """Check {"kg": CO2e of making the machine, "lifetime_years", "share": part of it this run
    occupies (default 1)}."""
    unknown = [k for k in values if k not in EMBODIED_KEYS]
    if unknown:
        raise BadInput(f"embodied has no '{unknown[0]}'{nearest(unknown[0], EMBODIED_KEYS)}")
    out = {"share": 1.0, "lifetime_years": 4.0, **values}
    if (
        not isinstance(out.get("kg"), (int, float))
        or out["kg"] < 0
        or not out["lifetime_years"] > 0
        or not 0 < out["share"] <= 1
    ):
        raise BadInput(
            "embodied needs kg >= 0, lifetime_years > 0 and share in (0, 1]; this is "
            f"{dict(values)}"
        )
    return {k: float(v) for k, v in out.items()}


def grams(energy_j: Reading, intensity: Mapping[str, Any], pue: float = 1.0) -> Reading:
    """Return grams of CO2e. intensity: {"value": g/kWh, "low", "high", "zone", "source",
    "assumed"}; PUE is a ratio ≥ 1."""
    value = intensity.get("value")
    if energy_j.value is None or value is None:
        reason = energy_j.reason or "no carbon intensity is known"
        return Reading("carbon_g", None, provenance=energy_j.provenance, reason=reason)
    assumed = intensity.get("assumed") and energy_j.provenance != PARTLY_UNKNOWN
    k = pue / JOULES_PER_KWH
    return Reading(
        "carbon_g",
        energy_j.value * k * value,
        (energy_j.low if energy_j.low is not None else energy_j.value)
        * k
        * intensity.get("low", value),
        (energy_j.high if energy_j.high is not None else energy_j.value)
        * k
        * intensity.get("high", value),
        method=f"{intensity.get('zone', '?')} {value:g} g/kWh × PUE {pue:g}",
        provenance="constant" if assumed else energy_j.provenance,
    )


def embodied_grams(hardware: Mapping[str, Any] | None, wall_s: float) -> Reading:
    """Return the grams of CO2e of making the machine that fall to a run: kg × share × run time /
    lifetime.

    hardware: the header's {"kg", "lifetime_years", "share"}; None where the user gave nothing.
    """
    if not hardware:
        return Reading("embodied_g", None, reason="no embodied carbon of the machine was given")
    grams = (
        hardware["kg"]
        * 1000
        * hardware.get("share", 1.0)
        * wall_s
        / (hardware.get("lifetime_years", 4.0) * YEAR_S)
    )
    return Reading(
        "embodied_g", grams, method="kg × share × run time / lifetime", provenance="estimated"
    )
