"""What an arm builds on (a teacher, a base): beside its own cost, with it as the whole line, and
shared among its users."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import Reading
from greenvis.report.arm_results import Reuse, Use
from greenvis.report.facts import Ancestor
from greenvis.report.runs import RunSummary, SeedRun
from greenvis.report.sums import mean_reading, sum_reading

Key = tuple[str, str, tuple[str, ...]]  # of an ancestor
Grid = Mapping[str, Any]


def with_reuse(run: SeedRun) -> Reading:
    """Return the energy of the whole line: that of the run and of all it builds on, as far as it is
    known."""
    made = run.training_energy_j
    return made if made.value is None else pricing.add([made, *(u.energy_j for u in run.uses)])


def users(runs: Iterable[SeedRun]) -> Counter[Key]:
    """Return how many finished seed runs of a report use each teacher or base."""
    return Counter(u.key for r in runs if r.done for u in r.uses)


def reuse(done: list[SeedRun], shared_by: Mapping[Key, int], grid: Grid | None) -> dict[str, Any]:
    """Return {"uses", "base_reuse", "train_energy_with_reuse_j"} of one arm's finished seeds.

    whole: charged in full to each seed. shared: divided by the number of runs of this report that
    use it. What has no known cost is in neither. Grams are priced with the grid and PUE of the run
    that uses it: its own are not in a `uses` line.
    """
    uses = {u.key: u for run in done for u in run.uses}
    line = {run.seed: with_reuse(run) for run in done}
    return {
        "train_energy_with_reuse_j": mean_reading(
            line.values(), {s: r.value for s, r in line.items()}
        ),
        "uses": [_use(u, shared_by[u.key]) for _, u in sorted(uses.items())],
        "base_reuse": _charged(done, shared_by, grid) if uses else None,
    }


def _use(ancestor: Ancestor, used_by_runs: int) -> Use:
    return Use(
        role=ancestor.role,
        name=ancestor.name,
        runs=list(ancestor.runs),
        energy_j=sum_reading([ancestor.energy_j]),
        used_by_runs=used_by_runs,
        **({"of": list(ancestor.of)} if ancestor.of else {}),
    )


def _charged(done: list[SeedRun], shared_by: Mapping[Key, int], grid: Grid | None) -> Reuse:
    totals = [pricing.add(u.energy_j for u in run.uses) for run in done]
    pairs = zip(done, totals, strict=True)
    return Reuse(
        whole_j=mean_reading(totals),
        whole_g=mean_reading(r.done.grams(joules, grid) for r, joules in pairs if r.done),
        shared_j=_shared(done, shared_by, lambda run, use: use.energy_j),
        shared_g=_shared(done, shared_by, lambda run, use: run.grams(use.energy_j, grid)),
    )


def _shared(
    done: list[SeedRun],
    shared_by: Mapping[Key, int],
    cost: Callable[[RunSummary, Ancestor], Reading],
) -> float | None:
    """Return the mean over seeds of what falls on one run of the parts whose cost is known; None
    where none is."""
    sums = []
    for run in done:
        parts = [(cost(run.done, u).value, shared_by[u.key]) for u in run.uses if run.done]
        sums.append([v / n for v, n in parts if v is not None])
    return math.fsum(x for known in sums for x in known) / len(sums) if any(sums) else None
