"""The noise floor of a benchmark's energies: how far the same work reads apart. What is smaller is
no difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from greenvis.meters.energy import load_coefficients
from greenvis.report import formatting


def ratio(equal: Iterable[float | None]) -> float | None:
    """Return how many times apart settings of the same work read, at most; None where none was
    measured.

    equal: energies of settings that do the same work as the one they are divided by.
    """
    apart = [math.exp(abs(math.log(r))) for r in equal if r]
    return max(apart, default=None)


def sentence(
    apart: float | None, settings: str = "", repeatability: Mapping[str, Any] | None = None
) -> str:
    """Say what the noise floor is, and how it is known.

    Args:
        apart: What `ratio` gave; None where nothing was done twice.
        settings: Those of the same work, in words.
        repeatability: The band of `greenvis doctor --repeat` when the figures were made, {"low",
            "high", "citation"}; None where the results do not say.
    """
    if apart is not None:
        figure = formatting.figures(max(apart, 1.001), 3)
        text = f"Noise floor of energies: ×{figure}, by which {settings} read apart"
        return f"{text}. A smaller difference is none."
    text = "Noise floor of energies: not measured then, for nothing was done twice"
    if repeatability is None:
        return f"{text}; the same work can read up to ×1.78 apart from one day to another."
    low, high = (formatting.figures(repeatability[k], 3) for k in ("low", "high"))
    band = f"the same work reads ×{low}–{high} from one time to another"
    return f"{text}; {band} ({repeatability['citation']})."


def repeatability() -> dict[str, Any]:
    """Return the band of `greenvis doctor --repeat` as results hold it."""
    band = load_coefficients()["repeatability"]
    return {k: band[k] for k in ("low", "high", "citation")}


def joules(value: float) -> str:
    """Return joules with the two figures they deserve."""
    return formatting.figures(value, 2)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows as a Markdown table, with a dash for what a row lacks; joules with the two
    figures they deserve, their ratios with two decimals."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(_cell(h, row.get(h)) for h in heads) + " |" for row in rows]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return formatting.MISSING
    if key == "energy_j":
        return joules(value)
    return f"{value:.2f}" if key == "energy_ratio" else str(value)
