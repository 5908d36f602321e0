"""Where the numbers come from, generated from the records: sources, grid, environment, what was not
counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import PAUSED
from greenvis.report.arms import Arm
from greenvis.report.groups import Attempt
from greenvis.report.reuse import use_energy


def describe(arms: list[Arm], grid: Mapping[str, Any] | None, notes: list[str]) -> dict[str, Any]:
    """Return {"environment", "recipe", "command", "sources", "carbon_intensity", "not_counted",
    "notes", …}."""
    attempts = [a for arm in arms for r in arm.all for a in r.attempts]
    shown = [a for arm in arms for r in arm.runs for a in r.attempts]
    newest = max(shown, key=lambda a: (a.start_s, a.id))
    return {
        "environment": {
            key: _different(a.header.get(key) for a in shown)
            for key in ("cpu", "gpu", "os", "host", "versions", "world_size")
        },
        "recipe": _different(a.facts.get("recipe") or a.header.get("recipe") for a in shown),
        "command": newest.header.get("command"),
        "commands": _different(a.header.get("command") for a in shown),
        "newest_run_s": newest.start_s,
        "git": _different(a.header.get("git") for a in shown),
        "data": _different(a.facts.get("data") for a in shown),
        "models": _different(a.facts.get("model") for a in shown),
        "pricing_model": pricing.MODEL,
        "sources": _sources(attempts),
        "carbon_intensity": [dict(grid)]
        if grid
        else _different(a.header.get("carbon_intensity") for a in attempts),
        "repriced": grid is not None,
        "pue": _different(a.header.get("pue") for a in attempts),
        "embodied": _different(a.header.get("embodied") for a in attempts),
        "not_counted": _not_counted(attempts),
        "crosscheck": _crosscheck(arms),
        "steal_s": _total(attempts, "steal_s"),
        "cpu_s": _total(attempts, "cpu_s"),
        "paused_s": _total(attempts, PAUSED + "wall_s"),
        "damaged_lines": sum(a.damaged_lines for a in attempts),
        "missing_ranks": sum(len(a.missing_ranks) for a in attempts),
        "notes": sorted({n for a in attempts for n in a.notes} | set(notes)),
    }


def _different(values: Iterable[Any]) -> list[Any]:
    """Return the different values there are, in a stable order, None left out."""
    # repr, for it is fast over many runs
    distinct = {repr(v): v for v in values if v not in (None, "", {}, [])}
    unique = {json.dumps(v, sort_keys=True): v for v in distinct.values()}
    return [unique[k] for k in sorted(unique)]


def _sources(attempts: list[Attempt]) -> list[dict[str, Any]]:
    """The energy sources used, one row for each different component, and on how many starts."""
    counts: dict[str, tuple[dict[str, Any], int]] = {}
    for a in attempts:
        for c in a.header.get("components") or []:
            key = repr(c)
            counts[key] = (c, counts[key][1] + 1 if key in counts else 1)
    rows: dict[str, dict[str, Any]] = {}
    for c, n in counts.values():
        keep = {
            k: c.get(k)
            for k in ("name", "source", "scope", "coefficient", "provenance", "citation", "reason")
        }
        keep |= {"repeatability": c["repeatability"]} if c.get("repeatability") else {}
        rows.setdefault(json.dumps(keep, sort_keys=True), {**keep, "attempts": 0})["attempts"] += n
    return [rows[k] for k in sorted(rows)]


def _not_counted(attempts: list[Attempt]) -> list[str]:
    """What the joules and grams leave out, in words."""
    out = [
        "network, storage and other machines",
        "runs made outside these records (tuning, earlier trials)",
    ]
    out += sorted({not_counted(u) for a in attempts for u in a.uses if use_energy(u).value is None})
    missing: dict[str, set[str]] = {}
    for a in attempts:
        for stage in a.energy.values():
            for name, reading in stage.items():
                if reading.value is None:
                    missing.setdefault(name, set()).add(reading.reason or "not observed")
    known = {
        n for a in attempts for e in a.energy.values() for n, r in e.items() if r.value is not None
    }
    out += [
        f"{n}: {'; '.join(sorted(missing[n]))}" + (" (on some runs)" if n in known else "")
        for n in sorted(missing)
    ]
    if not any(a.header.get("embodied") for a in attempts):
        out.append("embodied carbon of the hardware (none was given)")
    if all((a.header.get("pue") or 1) == 1 for a in attempts):
        out.append("cooling and power supply of the building (PUE 1)")
    if any(a.missing_ranks for a in attempts):
        out.append("processes whose record is missing (ranks without a file)")
    return out


def not_counted(use: Mapping[str, Any]) -> str:
    """Return what to say of a base or teacher at a cost that nobody knows."""
    return f"what it took to make {use['name']} (a {use['role']}): not known"


def _crosscheck(arms: list[Arm]) -> list[dict[str, Any]]:
    """codecarbon's reading beside ours, for each finished run that has one."""
    rows = []
    for arm in arms:
        for seed, run in sorted(arm.done.items()):
            fact = run.done.facts.get("codecarbon") if run.done else None
            if isinstance(fact, (Mapping, int, float)) and run.done:
                own = run.done.total_energy_j
                fact = dict(fact) if isinstance(fact, Mapping) else {"energy_j": fact}
                value = fact.get("energy_j")
                rows.append(
                    {
                        "arm": arm.label,
                        "seed": seed,
                        "energy_j": value,
                        "own_j": own.value,
                        "ratio": value / (own.value or 1.0)
                        if isinstance(value, (int, float)) and own.value
                        else None,
                        "within_band": _inside(value, own.low, own.high),
                        "detail": fact,
                    }
                )
    return rows


def _inside(value: Any, low: float | None, high: float | None) -> bool | None:
    if not isinstance(value, (int, float)) or low is None or high is None:
        return None
    return low <= value <= high


def _total(attempts: list[Attempt], quantity: str) -> float | None:
    values = [t[quantity] for a in attempts for t in a.totals.values() if quantity in t]
    return float(sum(values)) if values else None
