"""What an arm builds on (a teacher, a base): beside its own cost, with it as the whole line, and
shared among its users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import PROVENANCES, Reading
from greenvis.report import arms as arms_
from greenvis.report.groups import Attempt, SeedRun


def use_key(use: Mapping[str, Any]) -> str:
    """Return what makes two `uses` lines the same thing: role, name and run ids."""
    runs = use.get("runs")
    return repr(
        (
            str(use.get("role")),
            str(use.get("name")),
            sorted(map(str, runs if isinstance(runs, list) else [])),
        )
    )


def uses_of(run: SeedRun) -> dict[str, Mapping[str, Any]]:
    """Return the teacher and base lines behind a seed's result, each once."""
    return {use_key(u): u for a in run.chain for u in a.uses}


def use_energy(use: Mapping[str, Any]) -> Reading:
    """Return the energy a `uses` line carries."""
    e = use.get("energy_j")
    e = {"value": e} if isinstance(e, (int, float)) else (e if isinstance(e, Mapping) else {})
    v, p = e.get("value"), e.get("provenance")
    if not isinstance(v, (int, float)):
        return Reading("energy_j", None, reason=f"the cost of {use.get('name')} is not known")
    return Reading(
        "energy_j",
        v,
        e.get("low", v),
        e.get("high", v),
        "reused",
        p if p in PROVENANCES else "estimated",
    )


def unknown(row: Mapping[str, Any]) -> list[str]:
    """Return the names of what a row builds on at a cost that nobody knows: the weights of
    others."""
    return list(dict.fromkeys(u["name"] for u in row["uses"] if u["energy_j"]["value"] is None))


def with_reuse(run: SeedRun) -> Reading:
    """Return the energy of the whole line: that of the run and of all it builds on, as far as it is
    known."""
    made = run.training_energy_j
    return (
        made if made.value is None else pricing.add([made, *map(use_energy, uses_of(run).values())])
    )


def users(runs: Iterable[SeedRun]) -> Counter[str]:
    """Return how many finished seed runs of a report use each teacher or base (by `use_key`)."""
    return Counter(k for r in runs if r.done for k in uses_of(r))


def reuse(
    done: list[SeedRun], shared_by: Mapping[str, int], grid: arms_.Intensity | None
) -> dict[str, Any]:
    """Return {"uses", "base_reuse": None | {"whole_j", …}, "train_energy_with_reuse_j"} of one
    arm's finished seeds.

    whole: charged in full to each seed. shared: divided by the number of runs of this report that
    use it. What has no known cost is in neither. Grams are priced with the grid and PUE of the run
    that uses it: its own are not in a `uses` line.
    """
    uses: dict[str, Mapping[str, Any]] = {}
    for run in done:
        uses |= uses_of(run)
    line = [with_reuse(r) for r in done]
    by_seed = {str(r.seed): x.value for r, x in zip(done, line, strict=True) if x.value is not None}
    out: dict[str, Any] = {
        "train_energy_with_reuse_j": arms_.mean_reading(line) | {"by_seed": by_seed}
    }
    if not uses:
        return {**out, "uses": [], "base_reuse": None}
    rows = [
        {
            "role": str(u.get("role")), "name": str(u.get("name")), "runs": sorted(map(str,
            u.get("runs") or [])),
            "energy_j": arms_.sum_reading([use_energy(u)]), "used_by_runs": shared_by[k],
            **({"of": list(map(str, u["of"]))} if u.get("of") else {}),
        }
        for k, u in sorted(uses.items())
    ]  # fmt: skip
    totals = [pricing.add(use_energy(u) for u in uses_of(r).values()) for r in done]
    grams = [
        arms_.attempt_grams(r.done, w, grid) for r, w in zip(done, totals, strict=True) if r.done
    ]
    return {
        **out,
        "uses": rows,
        "base_reuse": {
            "whole_j": arms_.mean_reading(totals),
            "whole_g": arms_.mean_reading(grams),
            "shared_j": _shared(done, shared_by, lambda run, use: use_energy(use)),
            "shared_g": _shared(
                done, shared_by, lambda run, use: arms_.attempt_grams(run, use_energy(use), grid)
            ),
        },
    }


def _shared(
    done: list[SeedRun],
    shared_by: Mapping[str, int],
    cost: Callable[[Attempt, Mapping[str, Any]], Reading],
) -> float | None:
    """Return the mean over seeds of what falls on one run of the parts whose cost is known; None
    where none is."""
    sums = []
    for run in done:
        parts = [
            (cost(run.done, u).value, shared_by[k]) for k, u in uses_of(run).items() if run.done
        ]
        sums.append([v / n for v, n in parts if v is not None])
    return math.fsum(x for known in sums for x in known) / len(sums) if any(sums) else None
