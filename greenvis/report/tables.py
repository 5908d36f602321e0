"""The tables of a report, once for HTML, Markdown and CSV: what each column says, which value is best, how it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from greenvis.report import words
from greenvis.report.words import MISSING, si

Row = dict[str, Any]
MOST_ROWS = 100  # rows a page shows; results.csv has them all


@dataclass(frozen=True)
class Column:
    """One column: `number` for the CSV and for finding the best, `text` for people, `sub` a second line."""

    key: str
    title: str
    number: Callable[[Row], float | None]
    text: Callable[[Row], str]
    sub: Callable[[Row], str] = lambda row: ""
    badge: Callable[[Row], str | None] = lambda row: None
    better: str = ""  # "less", "more" or neither
    noise: Callable[[Row], float | None] = lambda row: None  # standard deviation over seeds


def costs(found: dict[str, Any]) -> list[Column]:
    """Return the columns of the first table: what was gained and what it cost."""
    metric = found["metric"]
    better = "less" if found["lower_is_better"] else "more"
    return [
        Column(
            metric,
            metric.capitalize(),
            lambda r: r[metric]["mean"],
            lambda r: words.spread(metric, r[metric]),
            lambda r: _seeds(r),
            lambda r: "measured" if r[metric]["n"] else None,
            better,
            lambda r: r[metric]["std"],
        ),
        Column(
            "vs_metric",
            f"{metric.capitalize()} vs baseline",
            lambda r: _vs(r, metric, "mean"),
            lambda r: words.points(metric, _vs(r, metric, "mean")),
            lambda r: words.significance(r["vs_baseline"][metric]) if r["vs_baseline"] else "",
        ),
        _reading("train_energy_j", "Training energy", "J"),
        Column(
            "vs_train_energy",
            "Training energy ÷ baseline",
            lambda r: _vs(r, "train_energy", "ratio"),
            lambda r: words.factor(r["vs_baseline"]["train_energy"]) if r["vs_baseline"] else MISSING,
            lambda r: _energy_test(r["vs_baseline"]["train_energy"]) if r["vs_baseline"] else "",
        ),
        _reading(
            "carbon_g", "Carbon (CO₂e)", "g", lambda r: "assumed grid" if r["assumed_grid"] else r["carbon_g"]["provenance"]
        ),
        Column(
            "reuse_j",
            "Builds on (not included)",
            lambda r: r["base_reuse"]["whole_j"]["value"] if r["base_reuse"] else None,
            lambda r: si(r["base_reuse"]["whole_j"]["value"], "J") if r["base_reuse"] else "nothing",
            lambda r: _reused(r),
            lambda r: r["base_reuse"]["whole_j"]["provenance"] if r["base_reuse"] else None,
        ),
        Column(
            "wall_s", "Time", lambda r: r["wall_s"], lambda r: words.duration(r["wall_s"]), better="less", noise=_std("wall_s")
        ),
    ]


def sizes() -> list[Column]:
    """Return the columns of the second table: compute, size and speed."""
    return [
        _plain("params", "Parameters"),
        _plain("trainable_params", "Trained parameters"),
        _plain("delta_bytes", "Size of what was learned", "B"),
        _plain("macs", "MACs an image"),
        _plain("train_flops", "Training FLOPs"),
        Column(
            "latency_p50_ms",
            "Latency p50",
            lambda r: (r["latency_ms"] or {}).get("p50"),
            lambda r: si(_ms(r, "p50"), "s"),
            lambda r: f"p95 {si(_ms(r, 'p95'), 's')}" if _ms(r, "p95") is not None else "",
            better="less",
            noise=_std("latency_p50_ms"),
        ),
        Column(
            "images_per_s",
            "Images/s",
            lambda r: r["images_per_s"],
            lambda r: si(r["images_per_s"]),
            better="more",
            noise=_std("images_per_s"),
        ),
        Column(
            "peak_memory_mb",
            "Peak memory",
            lambda r: r["peak_memory_mb"],
            lambda r: si(None if r["peak_memory_mb"] is None else r["peak_memory_mb"] * 1e6, "B"),
            better="less",
            noise=_std("peak_memory_mb"),
        ),
    ]


def cycle(found: dict[str, Any]) -> list[Column]:
    """Return the columns of the full-cycle table."""
    return [
        Column("make_j", "Training", lambda r: r["full_cycle"]["make_j"], lambda r: si(r["full_cycle"]["make_j"], "J")),
        Column(
            "reuse_whole_j",
            "Builds on, charged whole",
            lambda r: r["full_cycle"]["reuse_whole_j"],
            lambda r: si(r["full_cycle"]["reuse_whole_j"], "J"),
            lambda r: _grams(r, "whole_g"),
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
            lambda r: si(r["inference_energy_j"]["value"], "J"),
            lambda r: _band(r["inference_energy_j"], "J"),
            lambda r: r["inference_energy_j"]["provenance"],
            "less",
            lambda r: r["inference_energy_j"].get("std"),
        ),
        Column(
            "wh_per_1000_images",
            "Wh per 1,000 images",
            lambda r: r["full_cycle"]["wh_per_1000_images"],
            lambda r: _small(r["full_cycle"]["wh_per_1000_images"]),
        ),
        Column(
            "sci_g",
            "SCI (CO₂e an image)",
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


def cells(found: dict[str, Any], columns: list[Column], most: int = MOST_ROWS) -> list[dict[str, Any]]:
    """Return the first `most` arms as {"arm", "status", "baseline", "cells": [{"text", "sub", "badge", "best"}]}."""
    arms = found["arms"]
    best = {c.key: _best(found, c) for c in columns if c.better}
    return [
        {
            "arm": a,
            "status": arms[a]["status"],
            "baseline": a == found["baseline"],
            "techniques": _techniques(arms[a]),
            "cells": [
                {
                    "title": c.title,
                    "text": c.text(arms[a]),
                    "sub": c.sub(arms[a]),
                    "badge": c.badge(arms[a]),
                    "best": a in best.get(c.key, ()),
                }
                for c in columns
            ],
        }
        for a in found["order"][:most]
    ]


def used(found: dict[str, Any], columns: list[Column]) -> list[Column]:
    """Return the columns in which at least one arm has a value."""
    return [c for c in columns if any(c.number(found["arms"][a]) is not None for a in found["order"])]


def _best(found: dict[str, Any], column: Column) -> set[str]:
    """Return the arms with the best value, and those that the scatter of seeds does not tell from it; none if most are."""
    values = {a: v for a in found["order"] if (v := column.number(found["arms"][a])) is not None}
    if not values:
        return set()
    top = (min if column.better == "less" else max)(values, key=values.__getitem__)
    said = {a: column.text(found["arms"][a]) for a in values}
    noise = {a: column.noise(found["arms"][a]) or 0.0 for a in values}
    alike = {a for a, v in values.items() if said[a] == said[top] or abs(v - values[top]) < noise[a] + noise[top]}
    return alike if len(alike) <= len(values) / 2 else set()  # what most share is no distinction


def _std(key: str) -> Callable[[Row], float | None]:
    return lambda r: r["std"][key]


def _reading(key: str, title: str, unit: str, badge: Callable[[Row], str | None] | None = None) -> Column:
    return Column(
        key,
        title,
        lambda r: r[key]["value"],
        lambda r: si(r[key]["value"], unit),
        lambda r: _band(r[key], unit),
        badge or (lambda r: r[key]["provenance"]),
        "less",
        lambda r: r[key].get("std"),
    )


def _plain(key: str, title: str, unit: str = "") -> Column:
    return Column(key, title, lambda r: r[key], lambda r: si(r[key], unit), better="less")


def _band(reading: Row, unit: str) -> str:
    """Return the band of a reading: "1.98–4.01 kJ"."""
    if reading["value"] is None or reading["low"] is None or reading["low"] == reading["high"]:
        return ""
    low, high = si(reading["low"], unit), si(reading["high"], unit)
    same = low.split(" ")[-1] == high.split(" ")[-1]
    return f"{low.rsplit(' ', 1)[0] if same else low}–{high}"


def _seeds(row: Row) -> str:
    n = len(row["seeds"])
    if not n:
        return "not finished"
    return ("1 seed" if n == 1 else f"{n} seeds") + (", not all finished" if row["status"] == "partly done" else "")


def _techniques(row: Row) -> str:
    """Return the names in the fact `techniques`: names, {"name": …} or {NAME: {fields}}."""
    listed = row.get("techniques")
    names = (
        [t.get("name") or next(iter(t), "") if isinstance(t, dict) else t for t in listed] if isinstance(listed, list) else []
    )
    return ", ".join(map(str, names))


def _energy_test(r: Row | None) -> str:
    """Return the range over seeds and what the test says: "×0.47–0.49; difference shown (p = 0.001, 3 seeds)"."""
    return "; ".join(x for x in (words.factor_band(r), words.significance(r)) if x)


def _reused(row: Row) -> str:
    """Return what a row builds on: "base, 116 mg CO₂e"."""
    return ", ".join(x for x in (*dict.fromkeys(u["role"] for u in row["uses"]), _grams(row, "whole_g")) if x)


def _grams(row: Row, key: str) -> str:
    grams = row["base_reuse"][key] if row["base_reuse"] else None
    grams = grams["value"] if isinstance(grams, dict) else grams
    return "" if grams is None else f"{si(grams, 'g')} CO₂e"


def _users(row: Row) -> str:
    n = sorted({u["used_by_runs"] for u in row["uses"]})
    return f"among {' or '.join(map(str, n))} runs, {_grams(row, 'shared_g')}".removesuffix(", ") if n else ""


def _vs(row: Row, key: str, part: str) -> float | None:
    vs = row["vs_baseline"]
    return vs[key][part] if vs and vs[key] else None


def _ms(row: Row, key: str) -> float | None:
    value = (row["latency_ms"] or {}).get(key)
    return None if value is None else value / 1e3


def _small(value: float | None) -> str:
    return MISSING if value is None else words.figures(value)
