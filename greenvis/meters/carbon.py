"""What a record's header says of carbon: grid intensity, PUE and, where given, the carbon of making
the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.errors import BadInput, nearest
from greenvis.meters.grid import constant, lookup

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
