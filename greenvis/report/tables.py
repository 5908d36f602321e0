"""The tables of a report, once for HTML, Markdown and CSV: what columns say, what is shown, how it
is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenvis.report import formatting, reuse
from greenvis.report.columns import Column, Row
from greenvis.report.formatting import MISSING, si

MOST_ROWS = 100  # rows a page shows; results.csv has them all


def costs(results: dict[str, Any]) -> list[Column]:
    """Return the columns of the first table: what was gained and what it cost, with all it builds
    on first."""
    metric = results["metric"]
    reused = any(row["uses"] for row in results["arms"].values())
    line = [
        _reading(
            "train_energy_with_reuse_j",
            "Energy, base and teacher included",
            "J",
            lacks=reuse.unknown,
        ),
        _ratio("train_energy_with_reuse", "Energy ÷ baseline, base and teacher included"),
    ]
    own = "Own training energy" if reused else "Training energy"
    return [
        Column(
            metric,
            metric.capitalize(),
            lambda r: r[metric]["mean"],
            lambda r: formatting.spread(metric, r[metric]),
            lambda r: _seeds(r),
            lambda r: "measured" if r[metric]["n"] else None,
        ),
        Column(
            "vs_metric",
            f"{metric.capitalize()} vs baseline",
            lambda r: _vs(r, metric, "mean"),
            lambda r: formatting.points(metric, _vs(r, metric, "mean")),
            lambda r: _decided(r, metric),
            shown=lambda r: bool(r["vs_baseline"]) and formatting.shown(r["vs_baseline"][metric]),
        ),
        *(line if reused else ()),
        _reading("train_energy_j", own, "J"),
        _ratio("train_energy", f"{own} ÷ baseline"),
        _reading(
            "carbon_g",
            "Carbon of own training (CO₂e)" if reused else "Carbon (CO₂e)",
            "g",
            lambda r: "assumed grid" if r["assumed_grid"] else r["carbon_g"]["provenance"],
        ),
        Column(
            "reuse_j",
            "Builds on",
            lambda r: r["base_reuse"]["whole_j"]["value"] if r["base_reuse"] else None,
            _builds_on,
            lambda r: _reused(r),
            lambda r: r["base_reuse"]["whole_j"]["provenance"] if r["base_reuse"] else None,
        ),
        Column("wall_s", "Time", lambda r: r["wall_s"], lambda r: formatting.duration(r["wall_s"])),
    ]


def sizes() -> list[Column]:
    """Return the columns of the second table: compute, size and speed."""
    return [
        _plain("params", "Parameters"),
        _plain("trainable_params", "Trained parameters"),
        _plain("delta_bytes", "Size of what was learned", "B"),
        _plain("macs", "MACs per image"),
        _plain("train_flops", "Training FLOPs"),
        Column(
            "latency_p50_ms",
            "Latency p50",
            lambda r: (r["latency_ms"] or {}).get("p50"),
            lambda r: si(_ms(r, "p50"), "s"),
            lambda r: f"p95 {si(_ms(r, 'p95'), 's')}" if _ms(r, "p95") is not None else "",
        ),
        Column(
            "images_per_s", "Images/s", lambda r: r["images_per_s"], lambda r: si(r["images_per_s"])
        ),
        Column(
            "peak_memory_mb",
            "Peak memory",
            lambda r: r["peak_memory_mb"],
            lambda r: si(None if r["peak_memory_mb"] is None else r["peak_memory_mb"] * 1e6, "B"),
        ),
    ]


def cycle(results: dict[str, Any]) -> list[Column]:
    """Return the columns of the full-cycle table."""
    return [
        Column(
            "make_j",
            "Training",
            lambda r: r["full_cycle"]["make_j"],
            lambda r: si(r["full_cycle"]["make_j"], "J"),
        ),
        Column(
            "reuse_whole_j",
            "Builds on, charged whole",
            lambda r: r["full_cycle"]["reuse_whole_j"],
            _builds_on,
            lambda r: _reused(r),
        ),
        Column(
            "reuse_shared_j",
            "Builds on, shared",
            lambda r: r["full_cycle"]["reuse_shared_j"],
            lambda r: si(r["full_cycle"]["reuse_shared_j"], "J"),
            lambda r: _users(r),
        ),
        Column(
            "inference_energy_j",
            "One image",
            lambda r: r["inference_energy_j"]["value"],
            lambda r: formatting.reading(r["inference_energy_j"], "J"),
            lambda r: _band(r["inference_energy_j"], "J"),
            lambda r: r["inference_energy_j"]["provenance"],
        ),
        _ratio("inference_energy", "One image ÷ baseline"),
        Column(
            "wh_per_1000_images",
            "Wh per 1,000 images",
            lambda r: r["full_cycle"]["wh_per_1000_images"],
            lambda r: _small(r["full_cycle"]["wh_per_1000_images"]),
        ),
        Column(
            "sci_g",
            "SCI (CO₂e per image)",
            lambda r: r["sci"]["g_per_image"],
            lambda r: si(r["sci"]["g_per_image"], "g"),
        ),
        Column(
            "total_whole_j",
            "All, charged whole",
            lambda r: r["full_cycle"]["total_whole_j"],
            lambda r: si(r["full_cycle"]["total_whole_j"], "J"),
        ),
        Column(
            "total_shared_j",
            "All, shared",
            lambda r: r["full_cycle"]["total_shared_j"],
            lambda r: si(r["full_cycle"]["total_shared_j"], "J"),
        ),
    ]


def cells(
    results: dict[str, Any], columns: list[Column], most: int = MOST_ROWS
) -> list[dict[str, Any]]:
    """Return the first `most` arms as {"arm", "status", "baseline", "cells": [{"text", "sub",
    "badge", "shown"}]}."""
    arms = results["arms"]
    return [
        {
            "arm": a,
            "status": arms[a]["status"],
            "baseline": a == results["baseline"],
            "techniques": _techniques(arms[a]),
            "cells": [
                {
                    "title": c.title,
                    "text": c.text(arms[a]),
                    "sub": c.sub(arms[a]),
                    "badge": c.badge(arms[a]),
                    "shown": c.shown(arms[a]),
                }
                for c in columns
            ],
        }
        for a in results["order"][:most]
    ]


def used(results: dict[str, Any], columns: list[Column]) -> list[Column]:
    """Return the columns in which at least one arm has a value, or something to say of what it
    builds on."""
    rows = results["arms"].values()
    return [
        c
        for c in columns
        if any(c.number(r) is not None or (c.text is _builds_on and r["uses"]) for r in rows)
    ]


def _reading(
    key: str,
    title: str,
    unit: str,
    badge: Callable[[Row], str | None] | None = None,
    lacks: Callable[[Row], list[str]] = lambda row: [],
) -> Column:
    """Return the column of a reading, with its band below. lacks: the names of what is not in
    it."""
    return Column(
        key,
        title,
        lambda r: r[key]["value"],
        lambda r: formatting.reading(r[key], unit) + (" + not known" if lacks(r) else ""),
        lambda r: _band(r[key], unit),
        badge or (lambda r: r[key]["provenance"]),
    )


def _ratio(key: str, title: str) -> Column:
    """Return the column of an energy's ratio to the baseline, with its interval below."""
    return Column(
        f"vs_{key}",
        title,
        lambda r: _vs(r, key, "ratio"),
        lambda r: formatting.factor(r["vs_baseline"][key]) if r["vs_baseline"] else MISSING,
        lambda r: _interval(r["vs_baseline"][key]) if r["vs_baseline"] else "",
        shown=lambda r: bool(r["vs_baseline"]) and formatting.shown(r["vs_baseline"][key]),
    )


def _plain(key: str, title: str, unit: str = "") -> Column:
    return Column(key, title, lambda r: r[key], lambda r: si(r[key], unit))


def _band(reading: Row, unit: str) -> str:
    """Return the band of a reading: "1.98–4.01 kJ"."""
    if reading["value"] is None or reading["low"] is None or reading["low"] == reading["high"]:
        return ""
    low, high = si(reading["low"], unit, 2), si(reading["high"], unit, 2)
    same = low.split(" ")[-1] == high.split(" ")[-1]
    return f"{low.rsplit(' ', 1)[0] if same else low}–{high}"


def _seeds(row: Row) -> str:
    n = len(row["seeds"])
    if not n:
        return "not finished"
    return ("1 seed" if n == 1 else f"{n} seeds") + (
        ", not all finished" if row["status"] == "partly done" else ""
    )


def _techniques(row: Row) -> str:
    """Return the names in the fact `techniques`: names, {"name": …} or {NAME: {fields}}."""
    techniques = row.get("techniques")
    names = (
        [t.get("name") or next(iter(t), "") if isinstance(t, dict) else t for t in techniques]
        if isinstance(techniques, list)
        else []
    )
    return ", ".join(map(str, names))


def _interval(r: Row | None) -> str:
    """Return the interval of a ratio and whether it tells a difference: "×0.87–1.12, no difference
    shown"."""
    if not r or not r["n"]:
        return "no seed in common: not comparable by pairs"
    if r["low"] is None:
        return "one seed: no interval"
    return formatting.factor_band(r) + ("" if formatting.shown(r) else ", no difference shown")


def _decided(row: Row, metric: str) -> str:
    """Return the interval of the metric and what it decides: "−1.48 to +2.07: keeps"."""
    if not row["vs_baseline"]:
        return ""
    d = row["vs_baseline"][metric]
    return ": ".join(
        x for x in (formatting.interval(metric, d) if d else "", formatting.decided(d)) if x
    )


def _builds_on(row: Row) -> str:
    """Return what a row builds on in joules; what nobody knows is "not known", never 0."""
    if not row["uses"]:
        return "nothing"
    known = (
        si(row["base_reuse"]["whole_j"]["value"], "J")
        if row["base_reuse"]["whole_j"]["value"] is not None
        else ""
    )
    return " + ".join(x for x in (known, "not known" if reuse.unknown(row) else "") if x)


def _reused(row: Row) -> str:
    """Return what a row builds on: "base, 116 mg CO₂e; not counted: the weights of others"."""
    parts = ", ".join(
        x for x in (*dict.fromkeys(u["role"] for u in row["uses"]), _grams(row, "whole_g")) if x
    )
    return parts + (f"; not counted: {', '.join(names)}" if (names := reuse.unknown(row)) else "")


def _grams(row: Row, key: str) -> str:
    grams = row["base_reuse"][key] if row["base_reuse"] else None
    grams = grams["value"] if isinstance(grams, dict) else grams
    return "" if grams is None else f"{si(grams, 'g')} CO₂e"


def _users(row: Row) -> str:
    n = sorted({u["used_by_runs"] for u in row["uses"]})
    return (
        f"among {' or '.join(map(str, n))} runs, {_grams(row, 'shared_g')}".removesuffix(", ")
        if n
        else ""
    )


def _vs(row: Row, key: str, part: str) -> float | None:
    vs = row["vs_baseline"]
    # one seed: no interval, no comparison
    return vs[key][part] if vs and vs[key] and vs[key]["low"] is not None else None


def _ms(row: Row, key: str) -> float | None:
    value = (row["latency_ms"] or {}).get(key)
    return None if value is None else value / 1e3


def _small(value: float | None) -> str:
    return MISSING if value is None else formatting.figures(value, 2)
