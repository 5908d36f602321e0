"""`greenvis doctor`: where each figure comes from on this machine, how sure it is, and what would
make it surer."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from greenvis.errors import BadInput
from greenvis.meters import header
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.energy import Meter
from greenvis.meters.grid import lookup
from greenvis.meters.sources.base import MeterSource


def doctor(country: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each thing measured: {"what", "source", "provenance", "band", "why",
    "better"}."""
    meter = Meter()
    rows = [_row(c) for c in meter.components]
    if not any(c["name"] == "gpu" for c in meter.components):
        why = "; ".join(s.reason for s in meter.sources if s.accelerators and s.reason)
        rows.append(_plain("gpu", "none", "", why, ""))
    rows += [_source(source, meter.components) for source in meter.sources]
    rows += [_plain("meter source", "none", "", text, "") for text in meter.new_notes()]
    described = header.cpu()
    kind = "virtual machine" if described["virtual"] else "bare machine"
    rows.append(
        _plain(
            "processor",
            described["name"] or "name hidden",
            "",
            f"{described['allowed']} logical CPUs, {kind}",
            "",
        )
    )
    steal = meter.read().get("steal_s")
    rows.append(
        _plain(
            "steal",
            "/proc/stat" if steal is not None else "none",
            "measured",
            "time other machines took from this one",
            "",
        )
    )
    rows.append(_repeatability())
    rows.append(_grid(country))
    rows += [_library(name, why) for name, why in _LIBRARIES]
    return rows


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


def _row(c: dict[str, Any]) -> dict[str, Any]:
    k = c.get("coefficient") or {}
    band = (
        f"{k['low']:g} – {k['central']:g} – {k['high']:g} {k.get('unit', '')}"
        if k and c["provenance"] == "estimated"
        else ""
    )
    better = "" if c.get("provenance") == "measured" else _BETTER.get(c["name"], "")
    return {
        "what": c["name"], "source": c["source"], "provenance": c.get("provenance", ""),
        "band": band,
        "why": c.get("reason", ""), "better": better,
    }  # fmt: skip


def _source(source: MeterSource, components: list[dict[str, Any]]) -> dict[str, Any]:
    """Say of a source whether it can be read here, and what it is used for."""
    names = [c["name"] for c in components if c["observation"] in source.quantities.values()]
    provenance = " + ".join(dict.fromkeys(c["provenance"] for c in source.components))
    use = f"prices {' and '.join(names)}" if names else "others are surer"
    return _plain(
        f"meter source {source.name}",
        "not available" if source.reason else "available",
        provenance,
        source.reason or use,
        "",
    )


def _repeatability() -> dict[str, Any]:
    """Say how far the same work reads apart here: measured, or the default."""
    k = load_coefficients()["repeatability"]
    known = k["citation"].startswith("measured")
    return {
        "what": "repeatability", "source": "the same work, again" if known else "default",
        "provenance": "measured" if known else "estimated", "band": f"×{k['low']:.2g} – "
                                                                    f"×{k['high']:.2g}",
                                                                    "why": k["citation"],
        "better": "greenvis doctor --repeat, today and on another day: a minute each",
    }  # fmt: skip


def _plain(what: str, source: str, provenance: str, why: str, better: str) -> dict[str, Any]:
    return {
        "what": what,
        "source": source,
        "provenance": provenance,
        "band": "",
        "why": why,
        "better": better,
    }


def _grid(country: str | None) -> dict[str, Any]:
    try:
        intensity = lookup(country)
    except BadInput as error:
        return _plain("grid", "none", "", str(error), "give country= or intensity=")
    if intensity["assumed"]:
        why = (
            f"no country was given: {intensity['value']:g} g/kWh, the world average "
            f"({intensity['source']}), is assumed"
        )
        return _plain(
            "grid",
            "world average",
            "constant",
            why,
            'country="FRA" (ISO-3), or intensity= in g/kWh',
        )
    return _plain(
        "grid",
        intensity["zone"],
        "estimated",
        f"{intensity['value']:g} g/kWh, {intensity['year']}: {intensity['source']}",
        "",
    )


def _library(name: str, why: str) -> dict[str, Any]:
    try:
        return _plain(name, metadata.version(name), "", why, "")
    except metadata.PackageNotFoundError:
        return _plain(name, "not installed", "", why, f"pip install {name}")
