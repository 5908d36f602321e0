"""Where energy and carbon figures come from."""

from __future__ import annotations

from greenvis.report import formatting
from greenvis.report.blocks import Grid
from greenvis.report.estimates import Free
from greenvis.report.shape import Results

HEAD = ("Component", "Source", "Scope", "Coefficient (band)", "Known how", "Why, and from where")


def sources(results: Results) -> Grid:
    """Return a row for each source of energy."""
    return Grid(HEAD, tuple(_row(s) for s in results.sources), "Sources of energy")


def _row(s: Free) -> tuple[str, ...]:
    k, band, known = s.get("coefficient") or {}, formatting.MISSING, None
    if "central" in k:
        central, known = k["central"], s.get("provenance")
        low, high = k.get("low", central), k.get("high", central)
        band = f"{central:g} {k.get('unit', '')}".rstrip() + f" ({low:g}–{high:g})"
    return (
        str(s.get("name") or "?"),
        str(s.get("source") or "none"),
        str(s.get("scope") or formatting.MISSING),
        band,
        str(known or "not observed"),
        "; ".join(str(x) for x in (s.get("reason"), s.get("citation")) if x),
    )


def intensity(results: Results) -> list[str]:
    """Say which grids the grams were priced with."""
    out = []
    for g in results.carbon_intensity:
        if g.get("value") is None:
            continue
        band = (
            f" ({g['low']:g}–{g['high']:g})"
            if g.get("low") is not None and g.get("high") is not None
            else ""
        )
        year = f", {g['year']}" if g.get("year") else ""
        source = g.get("source") or "an unnamed source"
        assumed = (
            " ASSUMED: no place was given, so these grams are a guess at the world's average."
            if g.get("assumed")
            else ""
        )
        out.append(
            f"{g.get('zone', '?')}: {g['value']:g} g CO₂e per kWh{band}{year}, from "
            f"{source}.{assumed}"
        )
    if len(results.carbon_intensity) > 1:
        out.append(
            "The runs were priced with different grids: compare their joules, or give one grid for "
            "all."
        )
    if results.repriced:
        out.append(
            "The grams were priced anew with this intensity; the recorded one was set aside. "
            "Joules are unchanged."
        )
    pue = ", ".join(f"{p:g}" for p in results.pue) or "none recorded, 1 used"
    return [*(out or ["No carbon intensity is known: no grams are given."]), f"PUE: {pue}."]
