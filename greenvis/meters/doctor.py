"""`greenvis doctor`: where each figure comes from on this machine, how sure it is, and what would
make it surer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from greenvis.errors import BadInput
from greenvis.meters import header, repeat
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.energy import Meter
from greenvis.meters.grid import lookup
from greenvis.meters.sources.base import MeterSource


def doctor(country: str | None = None) -> list[dict[str, str]]:
    """Return a row for each thing measured, and for each source of readings.

    Args:
        country: a zone of `meters.grid`, for the grid's row.

    Returns:
        Rows {"what", "source", "provenance", "band", "why", "better"}: "better" is what would make
        a figure surer.
    """
    meter = Meter()
    rows = [_component(c) for c in meter.components]
    if not any(c["name"] == "gpu" for c in meter.components):
        why = "; ".join(s.reason for s in meter.sources if s.accelerators and s.reason)
        rows.append(_row("gpu", "none", why))
    rows += [_source(source, meter.components) for source in meter.sources]
    rows += [_row("meter source", "none", text) for text in meter.new_notes()]
    cpu = header.cpu()
    kind = "virtual machine" if cpu["virtual"] else "bare machine"
    where = f"{cpu['allowed']} logical CPUs, {kind}"
    steal = "/proc/stat" if "steal_s" in meter.read() else "none"
    return [
        *rows,
        _row("processor", cpu["name"] or "name hidden", where),
        _row("steal", steal, "time other machines took from this one", provenance="measured"),
        _repeatability(),
        _grid(country),
        *(_library(name, why) for name, why in _LIBRARIES),
    ]


_LIBRARIES = (
    ("codecarbon", "grid data, NVML bindings and the cross-check"),
    ("torch", "FLOPs, latency, GPU memory"),
    ("fvcore", "the second FLOPs counter"),
)
_BETTER = {
    "cpu": "RAPL on bare metal (chmod a+r /sys/class/powercap/*/energy_uj), or a coefficients file "
    "with wall-meter readings",
    "ram": "a processor with a RAPL memory counter, or a coefficients file",
    "gpu": "an NVIDIA driver with NVML",
}


def _row(
    what: str, source: str, why: str, *, provenance: str = "", band: str = "", better: str = ""
) -> dict[str, str]:
    return {
        "what": what, "source": source, "provenance": provenance, "band": band, "why": why,
        "better": better,
    }  # fmt: skip


def _component(c: dict[str, Any]) -> dict[str, str]:
    k, provenance = c["coefficient"], c.get("provenance", "")
    band = ""
    if provenance == "estimated":
        band = f"{k['low']:g} – {k['central']:g} – {k['high']:g} {k.get('unit', '')}"
    better = "" if provenance == "measured" else _BETTER.get(c["name"], "")
    return _row(
        c["name"], c["source"], c["reason"], provenance=provenance, band=band, better=better
    )


def _source(source: MeterSource, components: list[dict[str, Any]]) -> dict[str, str]:
    """Say of a source whether it can be read here, and what it is used for."""
    what = f"meter source {source.name}"
    if source.reason:
        return _row(what, "not available", source.reason)
    names = [c["name"] for c in components if c["observation"] in source.quantities.values()]
    use = f"prices {' and '.join(names)}" if names else "others are surer"
    provenance = " + ".join(dict.fromkeys(c["provenance"] for c in source.components))
    return _row(what, "available", use, provenance=provenance)


def _repeatability() -> dict[str, str]:
    """Say how far the same work reads apart here: measured, or the default."""
    k = load_coefficients()["repeatability"]
    known = k.get("hours", 0.0) >= repeat.APART_H
    return _row(
        "repeatability",
        "the same work, again" if known else "default",
        k["citation"],
        provenance="measured" if known else "estimated",
        band=f"×{k['low']:.2g} – ×{k['high']:.2g}",
        better="greenvis doctor --repeat, today and on another day: a minute each",
    )


def _grid(country: str | None) -> dict[str, str]:
    try:
        intensity = lookup(country)
    except BadInput as error:
        return _row("grid", "none", str(error), better="give country= or intensity=")
    if intensity["assumed"]:
        why = (
            f"no country was given: {intensity['value']:g} g/kWh, the world average "
            f"({intensity['source']}), is assumed"
        )
        better = 'country="FRA" (ISO-3), or intensity= in g/kWh'
        return _row("grid", "world average", why, provenance="constant", better=better)
    why = f"{intensity['value']:g} g/kWh, {intensity['year']}: {intensity['source']}"
    return _row("grid", intensity["zone"], why, provenance="estimated")


def _library(name: str, why: str) -> dict[str, str]:
    try:
        return _row(name, metadata.version(name), why)
    except metadata.PackageNotFoundError:
        return _row(name, "not installed", why, better=f"pip install {name}")
