"""Joules and grams from what a record observed. Standard library only; the model is linear, so
re-pricing is exact.

energy_j = sum over components of coefficient × observed quantity (watts per busy CPU × CPU-seconds,
watts per GB × GB-seconds, 1 × joules of a live counter). carbon_g = energy_j / 3.6e6 × PUE × g/kWh.
A component's band is that of its coefficient and, where it states one, of its repeatability: both
bounds are multiplied.
Bands within a host are fully correlated: bounds add, they are never combined in squares.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from greenvis.meters.record import PARTLY_UNKNOWN, PROVENANCES, STARTUP, UNSEEN, Reading, Run

MODEL = "linear-1"  # name and version of the pricing model
# of a component
PRICED = (
    "name",
    "source",
    "scope",
    "observation",
    "coefficient",
    "provenance",
    "reason",
    "devices",
    "repeatability",
)
JOULES_PER_KWH = 3.6e6
YEAR_S = 365.25 * 86400
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


def merged_energy(runs: Sequence[Run]) -> Reading:
    """Return the energy of the ranks of one run together, in joules."""
    spent = [
        reading for components in merge(runs).energy.values() for reading in components.values()
    ]
    return add(spent) if spent else Reading("energy_j", None, reason="no sample was recorded")


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


def facts(run: Run) -> dict[str, Any]:
    """Return a run's facts with the joules of what they observe: inference_energy_j, also of
    settings, and task_energy_j.

    Older records hold those joules themselves.
    """
    out, components = dict(run.facts), run.header.get("components") or []
    if (
        isinstance(out.get("inference"), Mapping)
        and (served := image(out["inference"], components)) is not None
    ):
        out["inference_energy_j"] = served
    rows = out.get("operating_points")
    if isinstance(rows, list) and all(
        isinstance(r, Mapping) and isinstance(r.get("passes"), list) for r in rows
    ):
        out["operating_points"] = settings(rows, components)
    if isinstance(out.get("task_observed"), list):
        out["task_energy_j"] = [
            None if t is None else joules(t, components).value for t in out["task_observed"]
        ]
    return out


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
    return add(energy(_numbers(totals), components).values())


def _numbers(totals: Any) -> dict[str, float]:
    """Return the numbers among what a record says was observed: records may come from other
    hands."""
    items = totals.items() if isinstance(totals, Mapping) else ()
    return {
        str(q): v
        for q, v in items
        if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


def image(
    served: Mapping[str, Any], components: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the joules of one image: of repeated readings {"samples", observations} the median,
    with its spread.

    None where a reading tells no energy.
    """
    entries = served.get("rounds")
    totals = [_numbers(r) for r in entries] if isinstance(entries, list) else []
    rounds = [(r.get("samples", 0.0), _step(r, components)) for r in totals]
    if not rounds or any(n <= 0 or j.value is None for n, j in rounds):
        return None
    each = sorted((j.value or 0.0) / n for n, j in rounds)
    n, middle = sorted(rounds, key=lambda r: (r[1].value or 0.0) / r[0])[len(rounds) // 2]
    if not middle.value:  # a counter that stands still in most rounds steps too rarely for them
        return None
    bounds = {k: (getattr(middle, k) or 0.0) / n for k in ("value", "low", "high")}
    more = {"provenance": middle.provenance, "spread": median_spread(each), "rounds": len(rounds)}
    return {**bounds, **more, "batch_size": served.get("batch_size")}


def settings(
    rows: Sequence[Mapping[str, Any]], components: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return settings of one model with their joules: each has "images" and "passes", the
    observations of each pass over them.

    The joules are the median pass's; "spread" is of the ratio to the first setting's.
    """
    passes = [[_step(_numbers(p), components) for p in row["passes"]] for row in rows]
    out = []
    for row, own in zip(rows, passes, strict=True):
        served = None
        images = _numbers(row).get("images", 0.0)
        if (
            own
            and images > 0
            and all(
                len(each) == len(own) and None not in [j.value for j in each] for each in passes
            )
        ):
            middle = sorted(own, key=lambda j: j.value or 0.0)[len(own) // 2]
            served = {k: (getattr(middle, k) or 0.0) / images for k in ("value", "low", "high")}
            served |= steadiness([j.value or 0.0 for j in own], [j.value or 0.0 for j in passes[0]])
        out.append(
            {**{k: v for k, v in row.items() if k != "passes"}, "inference_energy_j": served}
        )
    return out


def _step(totals: Mapping[str, float], components: Sequence[Mapping[str, Any]]) -> Reading:
    """Return the joules of a short time: a counter that did not step in it says nothing of its own
    health."""
    result = joules(totals, components)
    still = result.value is None and any(c.get("observation") in totals for c in components)
    return result._replace(value=0.0, low=0.0, high=0.0) if still else result


def steadiness(own: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """Return the number of passes, and the spread of the ratio of their energies to the first
    setting's if there is one."""
    ratios = [a / b for a, b in zip(own, first, strict=True) if b]
    return {"passes": len(own)} | ({"spread": median_spread(ratios)} if len(ratios) > 1 else {})


def median_spread(values: Sequence[float]) -> float:
    """Return how far a median of these positive readings is off by chance, as a share of it:
    quartile range ÷ √count.

    That is about its standard error, and one reading that a neighbour on the machine disturbed does
    not move it. Infinite for fewer than two.
    """
    if len(values) < 2:
        return math.inf
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / math.sqrt(len(values)) / middle if middle else 0.0


def _quantities(components: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is observed for the components' sake."""
    quantities = [str(c["observation"]) for c in components if c.get("observation")]
    return list(dict.fromkeys([*quantities, *(q + UNSEEN for q in quantities), "wall_s"]))


def carbon(energy_j: Reading, intensity: Mapping[str, Any], pue: float = 1.0) -> Reading:
    """Return grams of CO2e. intensity: {"value": g/kWh, "low", "high", "zone", "source",
    "assumed"}; PUE is a ratio ≥ 1."""
    value = intensity.get("value")
    if energy_j.value is None or value is None:
        reason = energy_j.reason or "no carbon intensity is known"
        return Reading("carbon_g", None, provenance=energy_j.provenance, reason=reason)
    assumed = intensity.get("assumed") and energy_j.provenance != PARTLY_UNKNOWN
    k = pue / JOULES_PER_KWH
    return Reading(
        "carbon_g",
        energy_j.value * k * value,
        (energy_j.low if energy_j.low is not None else energy_j.value)
        * k
        * intensity.get("low", value),
        (energy_j.high if energy_j.high is not None else energy_j.value)
        * k
        * intensity.get("high", value),
        method=f"{intensity.get('zone', '?')} {value:g} g/kWh × PUE {pue:g}",
        provenance="constant" if assumed else energy_j.provenance,
    )


def embodied(hardware: Mapping[str, Any] | None, wall_s: float) -> Reading:
    """Return the grams of CO2e of making the machine that fall to a run: kg × share × run time /
    lifetime.

    hardware: the header's {"kg", "lifetime_years", "share"}; None where the user gave nothing.
    """
    if not hardware:
        return Reading("embodied_g", None, reason="no embodied carbon of the machine was given")
    grams = (
        hardware["kg"]
        * 1000
        * hardware.get("share", 1.0)
        * wall_s
        / (hardware.get("lifetime_years", 4.0) * YEAR_S)
    )
    return Reading(
        "embodied_g", grams, method="kg × share × run time / lifetime", provenance="estimated"
    )
