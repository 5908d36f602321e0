"""Models that can be switched after training (thresholds of early exits): what each setting reaches
and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.report import formatting, stats
from greenvis.report.arms import Arm
from greenvis.report.formatting import MISSING, si

FIRST = "never"  # the setting that changes nothing, to which the others are compared
HEAD = (
    "Arm",
    "Setting",
    "Accuracy",
    "Energy of 1,000 images",
    "÷ never",
    "MACs per image",
    "÷ never",
    "Realised ÷ theoretical",
    "Leaves at exit 1, 2, … end",
)


REBATCHED = "Rebatched: behind an exit, images of several batches go on together, as a whole batch."


def settings(arm: Arm) -> list[dict[str, Any]]:
    """Return a row for each setting, means over finished seeds; [] where the arm has none.

    setting; accuracy {mean, std, n}; inference_energy_j, energy_ratio (to "never", same seed),
    macs, macs_ratio, realised (energy saved ÷ MACs saved), exits: share of the images that leaves
    at each. energy_spread: how far a pass over the images scatters about that ratio, a share of it,
    mean over seeds; None where the record does not say.
    """
    seeds = [_rows(run.done.facts.get("operating_points")) for run in arm.done.values() if run.done]
    names = list(dict.fromkeys(name for rows in seeds for name in rows))
    out = []
    for name in names:
        both = [(rows[name], rows.get(FIRST, {})) for rows in seeds if name in rows]
        energy, macs = ([_ratio(a, b, of) for a, b in both] for of in (_joules, _macs))
        out.append({
            "setting": name,
            "accuracy": stats.summary({i: float(a["accuracy"]) for i, (a,
            _) in enumerate(both) if _number(a.get("accuracy"))}),
            "inference_energy_j": _mean([_joules(a) for a, _ in both]),
            "energy_ratio": _mean(energy),
            "energy_spread": _mean([_spread(a) for a, _ in both]),
            "macs": _mean([_macs(a) for a, _ in both]),
            "macs_ratio": _mean(macs),
            "realised": _realised(_mean(energy), _mean(macs)),
            "exits": _shares([a.get("exits") for a, _ in both]),
        })  # fmt: skip
    return out


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's rows as text, `HEAD` above them."""
    rows = []
    for arm in results["order"]:
        for s in results["arms"][arm].get("operating_points", ()):
            joules = s["inference_energy_j"]
            rows.append([
                arm, s["setting"], formatting.spread("accuracy", s["accuracy"]),
                si(None if joules is None else joules * 1000, "J"),
                _give_or_take(s["energy_ratio"], s["energy_spread"]),
                si(s["macs"]), _times(s["macs_ratio"]), _times(s["realised"]),
                " · ".join(f"{share:.0%}" for share in s["exits"]) or MISSING,
            ])  # fmt: skip
    return rows


def note(rows: list[list[str]]) -> str:
    """Return what the table's readers must know beside it, "" where nothing."""
    return REBATCHED if any("rebatched" in row[1] for row in rows) else ""


def _rows(fact: Any) -> dict[str, Mapping[str, Any]]:
    """Return the settings of one run by name: records may come from other hands."""
    entries = fact if isinstance(fact, list) else []
    return {str(r["setting"]): r for r in entries if isinstance(r, Mapping) and "setting" in r}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _joules(row: Mapping[str, Any]) -> float | None:
    reading = row.get("inference_energy_j")
    value = reading.get("value") if isinstance(reading, Mapping) else None
    return float(value) if _number(value) else None  # type: ignore[arg-type]


def _spread(row: Mapping[str, Any]) -> float | None:
    reading = row.get("inference_energy_j")
    value = reading.get("spread") if isinstance(reading, Mapping) else None
    return float(value) if _number(value) else None  # type: ignore[arg-type]


def _macs(row: Mapping[str, Any]) -> float | None:
    value = row.get("macs")
    return float(value) if _number(value) else None  # type: ignore[arg-type]


def _ratio(a: Mapping[str, Any], b: Mapping[str, Any], of: Any) -> float | None:
    above, below = of(a), of(b)
    return above / below if above is not None and below else None


def _realised(energy: float | None, macs: float | None) -> float | None:
    """The energy saved as a share of the MACs saved; None where next to nothing was to be saved."""
    return (
        (1 - energy) / (1 - macs)
        if energy is not None and macs is not None and macs < 0.98
        else None
    )


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def _shares(tallies: list[Any]) -> list[float]:
    known = [t for t in tallies if isinstance(t, list) and t and all(_number(n) for n in t)]
    if not known or len({len(t) for t in known}) > 1:
        return []
    total = sum(sum(t) for t in known)
    return [sum(t[k] for t in known) / total for k in range(len(known[0]))] if total else []


def _give_or_take(ratio: float | None, spread: float | None) -> str:
    return _times(ratio) + (f" ± {ratio * spread:.2f}" if ratio is not None and spread else "")


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
