"""Amounts in units people read, with no more figures than are known. Standard library only."""

from __future__ import annotations

import math

MISSING = "–"
_PREFIX = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
)
ESTIMATED = ("J", "g")  # units of figures that no reading here tells to three figures


def figures(value: float, digits: int = 3) -> str:
    """Return `value` with that many significant figures, never in exponents below 1e6: 0.0123,
    1.23, 12,300."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def si(value: float | None, unit: str = "", digits: int = 0) -> str:
    """Return `value` with an SI prefix: "3.5 kJ", "460 mg", "1.26 G". digits: two of joules and
    grams, else three."""
    digits = digits or (2 if unit in ESTIMATED else 3)
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return f"0 {unit}".strip()
    rounded = float(f"{value:.{digits - 1}e}")
    scale, prefix = next(((s, p) for s, p in _PREFIX if abs(rounded) >= s), _PREFIX[-1])
    if not unit and scale <= 1:
        return figures(value, digits)
    return f"{figures(value / scale, digits)} {prefix}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Return "12.3 s", "4 min 10 s" or "2 h 05 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{figures(seconds)} s"
    minutes, s = divmod(round(seconds), 60)
    return (
        f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
    )
