"""Joules from what a record observed. Standard library only; the model is linear, so
re-pricing is exact.

energy_j = sum over components of coefficient × observed quantity (watts per busy CPU × CPU-seconds,
watts per GB × GB-seconds, 1 × joules of a live counter).
A component's band is that of its coefficient and, where it states one, of its repeatability: both
bounds are multiplied.
Bands within a host are fully correlated: bounds add, they are never combined in squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from greenvis.meters.record import PARTLY_UNKNOWN, PROVENANCES, STARTUP, UNSEEN, Reading, Run

MODEL = "linear-1"  # name and version of the pricing model
# of a component
PRICED = (
    "name", "source", "scope", "observation", "coefficient", "provenance", "reason", "devices",
    "repeatability",
)  # fmt: skip
JOULES_PER_KWH = 3.6e6
# unseen for more than this share of the time: all of it; for no more than this: never
WHOLE, NEVER_S = (0.999, 1e-9)
STILL_S = 2.0  # a part as short as this may end between two steps of a counter that is well


def energy(
    totals: Mapping[str, float], components: Iterable[Mapping[str, Any]]
) -> dict[str, Reading]:
    """Return each component's energy, in joules, for one phase's totals (or their sum).

    components: the header's list: {"name", "source", "observation", "coefficient": {"low",
    "central", "high"}, "provenance", "reason"}. A component whose observation is absent, or of
    which nothing was seen, reads None, with the reason; one that was seen in part is "partly
    unknown".
    """
    return {c["name"]: _component(totals, c) for c in components}


def _component(totals: Mapping[str, float], c: Mapping[str, Any]) -> Reading:
    quantity, k, source = (
        c.get("observation") or "",
        c.get("coefficient") or {},
        c.get("source", ""),
    )
    amount, provenance, reason = totals.get(quantity), c.get("provenance", "estimated"), ""
    if amount is None or "central" not in k:
        return Reading(
            "energy_j", None, None, None, source, provenance, c.get("reason") or "not observed"
        )
    unseen, wall = totals.get(quantity + UNSEEN, 0.0), totals.get("wall_s", 0.0)
    if 0 < unseen > WHOLE * wall or (amount <= 0 and quantity.endswith("_j")):
        provenance = PARTLY_UNKNOWN if unseen > 0 or wall > STILL_S else provenance
        reason = f"{source}: the counter stood still or told nothing that can be believed"
        return Reading("energy_j", None, None, None, source, provenance, reason)
    if abs(unseen) > NEVER_S:
        provenance, reason = (
            PARTLY_UNKNOWN,
            f"{source}: {abs(unseen):.2g} s of {wall:.3g} s were not seen in this part",
        )
    again = c.get("repeatability") or {}  # how far the same work reads apart on another day
    low, high = (
        k.get("low", k["central"]) * again.get("low", 1.0),
        k.get("high", k["central"]) * again.get("high", 1.0),
    )
    return Reading(
        "energy_j", amount * k["central"], amount * low, amount * high, source, provenance, reason
    )


def add(readings: Iterable[Reading], name: str = "energy_j") -> Reading:
    """Add readings bound by bound; missing ones are left out and named. The weakest provenance is
    the sum's.

    A missing reading weakens the sum where it is known to have spent something ("partly unknown").
    """
    items = list(readings)
    known = [r for r in items if r.value is not None]
    reason = "; ".join(dict.fromkeys(r.reason for r in items if r.reason))
    counted = [r.provenance for r in items if r.value is not None or r.provenance == PARTLY_UNKNOWN]
    weakest = PROVENANCES[max(map(PROVENANCES.index, counted), default=1)]
    if not known:
        return Reading(name, None, provenance=weakest, reason=reason or "not observed")
    return Reading(
        name,
        math.fsum(r.value or 0.0 for r in known),
        math.fsum((r.value if r.low is None else r.low) or 0.0 for r in known),
        math.fsum((r.value if r.high is None else r.high) or 0.0 for r in known),
        method=" + ".join(dict.fromkeys(r.method for r in known if r.method)),
        provenance=weakest,
        reason=reason,
    )


def run_energy(run: Run, phase: str | None = None) -> Reading:
    """Return the energy of a run, in joules, but for its process' start, or of one phase and those
    below it."""
    chosen = [
        t
        for p, t in run.totals.items()
        if (p != STARTUP if phase is None else (p + "/").startswith(phase + "/"))
    ]
    if not chosen:
        return Reading("energy_j", None, reason="no sample was recorded")
    quantities = {q: None for totals in chosen for q in totals}
    # what one phase missed, the next may have
    together = {q: math.fsum(t.get(q, 0.0) for t in chosen) for q in quantities}
    return add(energy(together, run.header.get("components") or []).values())


def forecast(
    figures: Mapping[str, Mapping[str, float]], components: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Return {"value", "low", "high"} in joules of quantities predicted as such; the coefficients'
    own band is not in it."""
    priced = list(components)
    bounds = ("value", "low", "high")
    spent = {
        b: add(energy({q: f[b] for q, f in figures.items()}, priced).values()).value for b in bounds
    }
    return {b: value or 0.0 for b, value in spent.items()}


def phases(run: Run) -> dict[str, dict[str, Reading]]:
    """Return energy by phase and component. Phases are disjoint: their sum is the run."""
    return {p: energy(t, run.header.get("components") or []) for p, t in run.totals.items()}


class Merged(NamedTuple):
    """The ranks of one run as one: totals by phase, energy by phase and component (joules), ranks
    without a record."""

    totals: dict[str, dict[str, float]]
    energy: dict[str, dict[str, Reading]]
    missing_ranks: list[int]


def merge(runs: Sequence[Run]) -> Merged:
    """Merge the ranks of one run: what a machine's counter saw counts once per host, what a process
    used is summed.

    Ranks run side by side: a phase's wall_s and steps are the longest rank's, not their sum.
    """
    out = Merged({}, {}, [])
    for run, components in zip(runs, charged(runs), strict=True):
        for phase, totals in run.totals.items():
            into = out.totals.setdefault(phase, {})
            for quantity, value in totals.items():
                side_by_side = quantity in ("wall_s", "steps", "steal_s")
                into[quantity] = (
                    max(into.get(quantity, 0.0), value)
                    if side_by_side
                    else into.get(quantity, 0.0) + value
                )
            spent = out.energy.setdefault(phase, {})
            for name, reading in energy(totals, components).items():
                spent[name] = add([spent[name], reading]) if name in spent else reading
    world = max([int(r.header.get("world_size") or 1) for r in runs] or [0])
    out.missing_ranks.extend(
        sorted(set(range(world)) - {int(r.header.get("rank") or 0) for r in runs})
    )
    return out


def charged(runs: Sequence[Run]) -> list[list[Mapping[str, Any]]]:
    """Return the components each rank is charged for: a machine's counter only on the rank of its
    host that saw most of it.

    Counters are told apart by host, boot, component and devices: ranks that hold a GPU each are
    charged for their own.
    """
    best: dict[tuple[Any, ...], tuple[float, int]] = {}
    for i, run in enumerate(runs):
        for c in run.header.get("components") or []:
            amount = run.sum(c.get("observation") or "") or 0.0
            best[_counter(run, c)] = max(best.get(_counter(run, c), (-1.0, 0)), (amount, -i))
    return [
        [
            c
            for c in run.header.get("components") or []
            if c.get("scope") != "machine" or best[_counter(run, c)][1] == -i
        ]
        for i, run in enumerate(runs)
    ]  # fmt: skip


def _counter(run: Run, component: Mapping[str, Any]) -> tuple[Any, ...]:
    h = run.header
    return (
        h.get("host"),
        h.get("boot_id"),
        component.get("name"),
        tuple(component.get("devices") or ()),
    )


def observed(attempts: Iterable[Sequence[Run]]) -> list[dict[str, Any]]:
    """Return what runs cost together, as observations: [{"components", "totals"}], one for each way
    of metering.

    attempts: each the records of one run's processes. `spent` prices it.
    """
    out: list[dict[str, Any]] = []
    for runs in attempts:
        for run, counted in zip(runs, charged(runs), strict=True):
            components = [{k: c[k] for k in PRICED if k in c} for c in counted]
            totals = {q: v for q in _quantities(components) if (v := run.sum(q)) is not None}
            totals = {q: v - (run.sum(q, STARTUP) or 0.0) for q, v in totals.items()}
            same = next((entry for entry in out if entry["components"] == components), None)
            if same is None:
                out.append({"components": components, "totals": totals})
            else:
                same["totals"] = {
                    q: same["totals"].get(q, 0.0) + totals.get(q, 0.0)
                    for q in {**same["totals"], **totals}
                }
    return out


def alike(
    entries: Iterable[Mapping[str, Any]], components: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return `observed` without the components that are the reader's own: these price it, whatever
    they come to be."""
    own = [{k: c[k] for k in PRICED if k in c} for c in components]
    return [{k: v for k, v in entry.items() if k != "components" or v != own} for entry in entries]


def spent(
    entries: Iterable[Mapping[str, Any]], components: Sequence[Mapping[str, Any]] = ()
) -> Reading:
    """Return the energy of what `observed` gave; components: those that price an entry without its
    own."""
    readings = [
        joules(e.get("totals"), e.get("components", components))
        for e in entries
        if isinstance(e, Mapping)
    ]
    return add(readings) if readings else Reading("energy_j", None, reason="not observed")


def uses(run: Run) -> list[dict[str, Any]]:
    """Return what a run builds on, with the joules of what its lines observe."""
    components = run.header.get("components") or []
    return [
        {**use, "energy_j": reading(spent(use["observed"], components))}
        if isinstance(use.get("observed"), list)
        else use
        for use in run.uses
    ]


def reading(energy_j: Reading) -> dict[str, Any]:
    """Return a reading as records and weight cards hold it."""
    return {
        "value": energy_j.value,
        "low": energy_j.low,
        "high": energy_j.high,
        "provenance": energy_j.provenance,
    }


def joules(totals: Any, components: Iterable[Mapping[str, Any]]) -> Reading:
    """Return the energy of what all components observed together; what is no number is not
    observed."""
    return add(energy(numbers(totals), components).values())


def numbers(totals: Any) -> dict[str, float]:
    """Return the numbers among what a record says was observed: records may come from other
    hands."""
    items = totals.items() if isinstance(totals, Mapping) else ()
    return {
        str(q): v
        for q, v in items
        if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


def _quantities(components: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is observed for the components' sake."""
    quantities = [str(c["observation"]) for c in components if c.get("observation")]
    return list(dict.fromkeys([*quantities, *(q + UNSEEN for q in quantities), "wall_s"]))
