"""Two runs side by side, and a gate on the energy of a change (`greenvis compare`, `diff`): plain
rows, which the command line prints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, some
from greenvis.report import results, stats, stored
from greenvis.report.estimates import Ratio
from greenvis.report.shape import Results

COMPARED = (
    "train_energy_j", "total_energy_j", "carbon_g", "inference_energy_j", "wall_s", "train_flops",
    "macs", "params",
    "trainable_params", "delta_bytes", "images_per_s", "peak_memory_mb",
)  # fmt: skip


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], metric: str | None = None
) -> list[dict[str, Any]]:
    """Compare two runs, folders of runs or results.json files: one row per arm and quantity.

    Arms are matched by name; two single arms of different names are compared with each other.

    Args:
        a: what is compared with.
        b: what is compared.
        metric: what the arms gain; by default what the records say themselves.

    Returns:
        Rows of {"arm", "quantity", "a", "b", "ratio" (b ÷ a), "change_percent"}; that of the metric
        has its unit, too: "metric_unit".

    Raises:
        BadInput: where nothing matches.
    """
    one, other = _side(a, metric), _side(b, metric)
    _same_metric(a, b, one, other)
    left, right, measure = one.as_json()["arms"], other.as_json()["arms"], one.measure
    rows = []
    for m, n in _matched(a, b, left, right).items():
        x, y, label = left[m], right[n], m if m == n else f"{m} → {n}"
        gains = [_number(row.get(measure.name), "mean") for row in (x, y)]
        values = [(measure.name, gains[0], gains[1])]
        values += [(k, _number(x.get(k), "value"), _number(y.get(k), "value")) for k in COMPARED]
        values.append(
            (
                "latency_p50_ms",
                _number(x.get("latency_ms"), "p50"),
                _number(y.get("latency_ms"), "p50"),
            )
        )
        for quantity, u, v in values:
            if u is not None or v is not None:
                ratio = v / u if u and v is not None else None
                change = None if ratio is None else (ratio - 1) * 100
                rows.append(
                    {
                        "arm": label,
                        "quantity": quantity,
                        "a": u,
                        "b": v,
                        "ratio": ratio,
                        "change_percent": change,
                    }
                    | ({"metric_unit": measure.unit} if quantity == measure.name else {})
                )
    return rows


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    max_energy: str = "+5%",
    metric: str | None = None,
) -> tuple[bool, list[dict[str, Any]]]:
    """Say whether the training energy of `b` stays within a limit of that of `a`, for every arm of
    `a`.

    Args:
        a: records, folders of them or a results.json (a committed report is a good one).
        b: as `a`.
        max_energy: "+5%" allows 5 % more, "-10%" demands 10 % less.
        metric: what the arms gain; by default what the records say themselves.

    Returns:
        Whether all arms are within it, and one row per arm: {"arm", "a_j", "b_j", "ratio", "low",
        "high", "limit", "ok", "why"}; the ratio has an interval where both have two seeds. An arm
        that is missing or unfinished in `b` is not ok; one that is unfinished in `a` is left out.
    """
    limit = _limit(max_energy)
    left, right = (_side(side, metric).as_json()["arms"] for side in (a, b))
    pairs = _matched(a, b, left, right)
    rows = []
    for label, x in left.items():
        if x["train_energy_j"]["value"] is None:
            continue
        y = right[pairs[label]] if label in pairs else None
        u = x["train_energy_j"]["value"]
        v = y["train_energy_j"]["value"] if y else None
        r = _ratio(x, y) if y else None
        why = (
            ""
            if r
            else (f"no arm '{label}' in {b}" if not y else "no finished run with a known energy")
        )
        ok = r is not None and r.ratio <= limit * (1 + 1e-12)
        if r and not ok:
            why = f"{(r.ratio - 1) * 100:+.1f} % is over {(limit - 1) * 100:+.1f} %"
        spread = {k: getattr(r, k, None) for k in ("ratio", "low", "high")}
        rows.append(
            {"arm": label, "a_j": u, "b_j": v, **spread, "limit": limit, "ok": ok, "why": why}
        )
    return bool(rows) and all(r["ok"] for r in rows), rows


def _ratio(x: dict[str, Any], y: dict[str, Any]) -> Ratio | None:
    u, v = (r["train_energy_j"].get("by_seed") or {} for r in (x, y))
    if u and v:
        return stats.ratio(v, u)
    u, v = x["train_energy_j"]["value"], y["train_energy_j"]["value"]
    return stats.ratio({0: v}, {0: u}) if u is not None and v is not None else None


def _limit(text: str) -> float:
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*%\s*", str(text))
    if not match:
        raise BadInput(
            f"max_energy is '{text}'; write a percentage: '+5%' allows 5 % more, '-10%' demands 10 "
            "% less"
        )
    return 1 + float(match[1]) / 100


def _same_metric(a: Any, b: Any, one: Results, other: Results) -> None:
    if one.metric != other.metric:
        raise BadInput(
            f"{a} is judged by {one.metric} and {b} by {other.metric}: these cannot be compared"
        )


def _side(path: str | os.PathLike[str], metric: str | None) -> Results:
    """Return the results at a path: of a results.json, of the report in a folder, or of records."""
    source = Path(path)
    file = source / "results.json" if (source / "results.json").is_file() else source
    if file.suffix != ".json":
        return results([path], metric=metric)
    return stored.read(file)


def _matched(a: Any, b: Any, left: dict[str, Any], right: dict[str, Any]) -> dict[str, str]:
    """Return which arm of the right goes with which of the left: those of one name, or the only one
    on each side."""
    both = {k: k for k in left if k in right}
    if both:
        return both
    if len(left) == len(right) == 1:
        return dict(zip(left, right, strict=True))
    raise BadInput(
        f"{a} has arms {some(left)} and {b} has {some(right)}: none in common; point at one arm's "
        "folder on each side"
    )


def _number(value: Any, part: str) -> float | None:
    value = value.get(part) if isinstance(value, dict) else value
    return value if isinstance(value, (int, float)) else None
