"""A run as a report sees it: `RunSummary`, made from the records of its processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from greenvis.meters import carbon, labels, pricing
from greenvis.meters.record import STARTUP, Reading
from greenvis.report.facts import Ancestor, Facts, Setup

# stages that are not part of making the model: latency and FLOP measurement
APART = ("measure", "report", STARTUP)

Curve = list[tuple[float, float]]  # joules so far, metric


@dataclass
class RunSummary:
    """One start of a run, its processes merged. `energy[stage][component]` in joules."""

    id: str
    status: str
    reason: str
    setup: Setup
    facts: Facts
    uses: list[Ancestor]
    notes: list[str]
    totals: dict[str, dict[str, float]]
    energy: dict[str, dict[str, Reading]]
    curve: Curve
    timed_j: Reading | None  # per image, of the phases that timed inference
    missing_ranks: list[int]
    damaged_lines: int
    # what starting its process took: imports, checks, first calls; in the total, in no arm
    startup_j: Reading
    # what of its energy counts in a sum of all runs: not what another record counts as well
    own_j: Reading
    label_lines: list[Mapping[str, Any]]  # of all its processes (`meters.labels`)
    image_lines: list[Mapping[str, Any]]
    seen_j: Reading  # what its counters saw, with what other runs saw at the same time
    inside: bool = False  # another record here already counts all of it

    def metric(self, name: str) -> float | None:
        """Return the metric: the run's fact, else the last value it logged."""
        known = self.facts.numbers.get(name)
        return known if known is not None or not self.curve else self.curve[-1][1]

    @cached_property
    def inference_energy_j(self) -> Reading | None:
        """Joules per image: the run's fact, else what the timed inference of the measure phase
        took."""
        timed = self.timed_j if self.timed_j and self.timed_j.value is not None else None
        return self.facts.inference_energy_j or timed

    @cached_property
    def total_energy_j(self) -> Reading:
        """The energy of all its stages."""
        return total(r for c in self.energy.values() for r in c.values())

    @cached_property
    def training_energy_j(self) -> Reading:
        """The energy of the stages that make the model: all but measurement."""
        return total(r for s, c in self.energy.items() if s not in APART for r in c.values())

    def grams(self, joules: Reading, grid: Mapping[str, Any] | None) -> Reading:
        """Return the CO2e of some of its joules, priced with its own grid, or with `grid`."""
        pue = 1.0 if self.setup.pue is None else self.setup.pue
        return carbon.grams(joules, grid or self.setup.carbon_intensity, pue)

    def embodied_g(self, seconds: float) -> float | None:
        """Return the grams of CO2e of making the machine that fall on that time of use; None where
        they were not given."""
        try:
            return carbon.embodied_grams(self.setup.embodied, seconds).value
        except (TypeError, KeyError, ZeroDivisionError):  # a header of other hands
            return None

    def seconds(self) -> list[float]:
        """Return the wall time of each stage that makes the model."""
        return [t["wall_s"] for s, t in self.totals.items() if s not in APART and "wall_s" in t]


@dataclass
class SeedRun:
    """All attempts at one (name, arm, seed, inputs), in order."""

    name: str
    arm: str
    seed: int
    inputs: str
    tracked: bool  # made by gv.track: an arm of its own
    attempts: list[RunSummary] = field(default_factory=list)

    @cached_property
    def done(self) -> RunSummary | None:
        """The last finished attempt: it gives the results."""
        return next((a for a in reversed(self.attempts) if a.status == "done"), None)

    @cached_property
    def chain(self) -> list[RunSummary]:
        """The attempts that led to the results: the last finished one and those that broke off
        before it.

        What finished earlier was repeated, not resumed: its energy is in the totals, not in the
        cost of this result.
        """
        ends = [i for i, a in enumerate(self.attempts) if a.status == "done"]
        return self.attempts[ends[-2] + 1 if len(ends) > 1 else 0 : ends[-1] + 1] if ends else []

    @cached_property
    def training_energy_j(self) -> Reading:
        """The energy that led to the result, but for measurement: set-up, train, teacher, eval,
        …"""
        return pricing.add(a.training_energy_j for a in self.chain)

    @cached_property
    def total_energy_j(self) -> Reading:
        """The energy that led to the result, measurement included."""
        return pricing.add(a.total_energy_j for a in self.chain)

    @cached_property
    def counts(self) -> labels.Counts | None:
        """Labels and images of all that led to the result; of a record that states none, the
        training set its data names."""
        spent = [line for a in self.chain for line in a.label_lines]
        shown = [line for a in self.chain for line in a.image_lines]
        data = self.done.facts.data if self.done else None
        stated = labels.counts(spent, shown)
        return stated or (labels.of_data(data) if isinstance(data, Mapping) else None)

    @cached_property
    def uses(self) -> list[Ancestor]:
        """The teachers and bases behind the result, each once."""
        return list({u.key: u for a in self.chain for u in a.uses}.values())

    @property
    def last_number(self) -> int:
        """The number of its last attempt."""
        return max(a.setup.number for a in self.attempts)

    @property
    def newest_s(self) -> float:
        """When its last attempt began."""
        return max(a.setup.start_s for a in self.attempts)


@dataclass
class Arm:
    """The seed runs shown for one arm, and those of older inputs, which only keep their energy in
    the totals."""

    label: str
    runs: list[SeedRun]
    older: list[SeedRun] = field(default_factory=list)

    @cached_property
    def done(self) -> dict[int, SeedRun]:
        """Seed runs that finished, by seed."""
        return {r.seed: r for r in self.runs if r.done}

    @cached_property
    def finished(self) -> dict[int, RunSummary]:
        """The finished attempts, by seed."""
        return {r.seed: r.done for r in self.runs if r.done}

    @property
    def all(self) -> list[SeedRun]:
        """Every seed run, older inputs included."""
        return [*self.runs, *self.older]


def total(readings: Iterable[Reading]) -> Reading:
    """Return a sum that says so where nothing was recorded."""
    items = list(readings)
    return (
        pricing.add(items) if items else Reading("energy_j", None, reason="no sample was recorded")
    )
