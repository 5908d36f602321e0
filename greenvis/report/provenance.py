"""Where the numbers come from, generated from the records: sources, grid, environment, what was not
counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import PARTLY_UNKNOWN, PAUSED
from greenvis.report.estimates import Free
from greenvis.report.facts import MACHINE, Ancestor, number
from greenvis.report.runs import Arm, RunSummary
from greenvis.report.shape import Check, Provenance


def describe(arms: list[Arm], grid: Mapping[str, Any] | None, notes: list[str]) -> Provenance:
    """Return where the numbers of those arms come from, with notes on records that were left
    out."""
    attempts = [a for arm in arms for r in arm.all for a in r.attempts]
    shown = [a for arm in arms for r in arm.runs for a in r.attempts]
    newest = max(shown, key=lambda a: (a.setup.start_s, a.id)).setup
    return Provenance.model_validate(
        {
            "environment": {k: _different(a.setup.machine[k] for a in shown) for k in MACHINE},
            "recipe": _different(a.facts.recipe or a.setup.recipe for a in shown),
            "command": newest.command,
            "commands": _different(a.setup.command for a in shown),
            "newest_run_s": newest.start_s,
            "git": _different(a.setup.git for a in shown),
            "data": _different(a.facts.data for a in shown),
            "models": _different(a.facts.model for a in shown),
            "pricing_model": pricing.MODEL,
            "sources": _sources(attempts),
            "carbon_intensity": [dict(grid)]
            if grid
            else _different(a.setup.carbon_intensity for a in attempts),
            "repriced": grid is not None,
            "pue": _different(a.setup.pue for a in attempts),
            "embodied": _different(a.setup.embodied for a in attempts),
            "not_counted": _not_counted(attempts),
            "crosscheck": _crosscheck(arms),
            "steal_s": _total(attempts, "steal_s"),
            "cpu_s": _total(attempts, "cpu_s"),
            **_waiting(attempts),
            "paused_s": _total(attempts, PAUSED + "wall_s"),
            "damaged_lines": sum(a.damaged_lines for a in attempts),
            "missing_ranks": sum(len(a.missing_ranks) for a in attempts),
            "notes": sorted({n for a in attempts for n in a.notes} | set(notes)),
        }
    )


def _different(values: Iterable[Any]) -> list[Any]:
    """Return the different values there are, in a stable order, None left out."""
    # repr, for it is fast over many runs
    distinct = {repr(v): v for v in values if v not in (None, "", {}, [])}
    unique = {json.dumps(v, sort_keys=True): v for v in distinct.values()}
    return [unique[k] for k in sorted(unique)]


def _sources(attempts: list[RunSummary]) -> list[Free]:
    """The energy sources used, one row for each different component, and on how many starts."""
    counts: dict[str, tuple[Free, int]] = {}
    for a in attempts:
        for c in a.setup.components:
            key = repr(c)
            counts[key] = (c, counts[key][1] + 1 if key in counts else 1)
    rows: dict[str, Free] = {}
    for c, n in counts.values():
        keep = {
            k: c.get(k)
            for k in ("name", "source", "scope", "coefficient", "provenance", "citation", "reason")
        }
        keep |= {"repeatability": c["repeatability"]} if c.get("repeatability") else {}
        rows.setdefault(json.dumps(keep, sort_keys=True), {**keep, "attempts": 0})["attempts"] += n
    return [rows[k] for k in sorted(rows)]


def _not_counted(attempts: list[RunSummary]) -> list[str]:
    """What the joules and grams leave out, in words."""
    out = [
        "network, storage and other machines",
        "runs made outside these records (tuning, earlier trials)",
    ]
    out += sorted({not_counted(u) for a in attempts for u in a.uses if u.energy_j.value is None})
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
    if not any(a.setup.embodied for a in attempts):
        out.append("embodied carbon of the hardware (none was given)")
    if all((a.setup.pue or 1) == 1 for a in attempts):
        out.append("cooling and power supply of the building (PUE 1)")
    if any(a.missing_ranks for a in attempts):
        out.append("processes whose record is missing (ranks without a file)")
    return out


def not_counted(use: Ancestor) -> str:
    """Return what to say of a base or teacher at a cost that nobody knows."""
    return f"what it took to make {use.name} (a {use.role}): not known"


def _crosscheck(arms: list[Arm]) -> list[Check]:
    """codecarbon's reading beside ours, for each finished run that has one."""
    rows = []
    for arm in arms:
        for seed, run in sorted(arm.finished.items()):
            detail, own = run.facts.codecarbon, run.total_energy_j
            if detail is None:
                continue
            value = number(detail.get("energy_j"))
            rows.append(
                Check(
                    arm=arm.label,
                    seed=seed,
                    energy_j=value,
                    own_j=own.value,
                    ratio=value / own.value if value is not None and own.value else None,
                    within_band=_inside(value, own.low, own.high),
                    detail=detail,
                )
            )
    return rows


def _inside(value: float | None, low: float | None, high: float | None) -> bool | None:
    if value is None or low is None or high is None:
        return None
    return low <= value <= high


def _total(attempts: list[RunSummary], quantity: str) -> float | None:
    values = [t[quantity] for a in attempts for t in a.totals.values() if quantity in t]
    return float(sum(values)) if values else None


def _waiting(attempts: list[RunSummary]) -> dict[str, float]:
    """Return for how long no processor worked for the runs, and what memory took meanwhile."""
    seconds = joules = 0.0
    for attempt in attempts:
        wall, cpu = _total([attempt], "wall_s"), _total([attempt], "cpu_s")
        if not wall or cpu is None or cpu >= wall or _on_gpu(attempt):
            continue
        ram = sum(c["ram"].value or 0.0 for c in attempt.energy.values() if "ram" in c)
        seconds, joules = seconds + wall - cpu, joules + ram * (1 - cpu / wall)
    return {"waiting_s": seconds, "waiting_ram_j": joules}


def _on_gpu(attempt: RunSummary) -> bool:
    parts = (c["gpu"] for c in attempt.energy.values() if "gpu" in c)
    return any(r.value is not None or r.provenance == PARTLY_UNKNOWN for r in parts)
