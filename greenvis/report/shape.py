"""The results of a report, schema 2 of results.json: one definition, which building yields, reading
validates (strangers write these files, too) and pages, tables, figures and exports read.

Units stand in the names. None is "not known", never 0. What a file holds beyond these fields is
kept and written again. Two keys of the file are the metric's own name: an arm's `gain` and its
`vs_baseline.gain` ("accuracy" by default).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from greenvis.errors import one_line
from greenvis.report.arm_results import ArmResults
from greenvis.report.estimates import (
    Command,
    Count,
    Estimate,
    Float,
    Free,
    LabelSeconds,
    Number,
    Part,
    Text,
    Word,
)
from greenvis.report.measures import named
from greenvis.tasks.base import Measure

SCHEMA = 2
MOST_PROBLEMS = 3  # said of one file


class Member(Part):
    """A model of a family: what it cost, and with all it was made from, each once."""

    own_j: Number
    line_j: Number


class Link(Part):
    """A child (`of`) and what it builds on."""

    of: Word
    on: Word
    role: Word


class Family(Part):
    """All arms that build on others, with all they build on."""

    members: dict[Word, Member]
    links: list[Link]


class Overlapping(Part):
    """Starts that ran beside others on one counter, or in one process: what they read together, and
    what of that is counted; arms have equal shares of what several saw."""

    starts: int
    seen_j: Estimate
    counted_j: Estimate


class Totals(Part):
    """Everything the records burnt, once. `startup_j`: what `starts` processes took to start, in no
    arm."""

    energy_j: Estimate
    carbon_g: Estimate
    unfinished_energy_j: Estimate
    startup_j: Estimate | None = None
    starts: int = 0
    overlapping: Overlapping | None = None
    nested_runs: int = 0
    runs: int
    attempts: dict[Word, int]


class Unfinished(Part):
    """A seed run that never finished."""

    arm: Word
    seed: int
    attempts: list[Word]
    reason: Text
    energy_j: Estimate


class Check(Part):
    """codecarbon's reading beside ours."""

    arm: Word
    seed: int
    ratio: Number
    own_j: Number
    energy_j: Number
    within_band: bool | None
    detail: Free


class Environment(Part):
    """The different machines and versions among the records."""

    cpu: list[Any]
    gpu: list[Any]
    host: list[Any]
    os: list[Any]
    versions: list[Free]
    world_size: list[Any]


class Floor(Part):
    """How many times apart arms of the same work read at most, and which arms these are."""

    ratio: Float
    arms: list[Word]


class Floors(Part):
    """Noise floors of training and of serving one image."""

    training: Floor | None = None
    serving: Floor | None = None


class Provenance(Part):
    """Where the numbers come from. Lists hold the different values among the records."""

    environment: Environment
    command: Command | None  # of the newest run
    commands: list[Command]
    recipe: list[Text | Free]
    git: list[Any]
    data: list[Any]
    models: list[Any]
    sources: list[Free]
    carbon_intensity: list[Free]
    pue: list[Float]
    embodied: list[Any] = []
    crosscheck: list[Check]
    not_counted: list[Text]
    notes: list[Text]
    newest_run_s: Annotated[float, Field(ge=0, le=1e11)]
    damaged_lines: int
    missing_ranks: int
    steal_s: Number
    cpu_s: Number
    waiting_s: Annotated[float, Field(ge=0)] = 0.0  # of the runs' time, while no processor worked
    waiting_ram_j: Annotated[float, Field(ge=0)] = 0.0  # of memory held meanwhile
    paused_s: Count = None
    repriced: bool
    pricing_model: Word

    @property
    def assumed_grid(self) -> bool:
        """Whether grams use the world's average, for no place was given."""
        return any(g.get("assumed") for g in self.carbon_intensity)


class Results(Provenance):
    """All that a report says."""

    version: Annotated[int, Field(alias="schema")] = SCHEMA
    name: Word
    title: Word | None
    note: Annotated[str, Field(max_length=100_000)] | None
    baseline: Word | None
    arm: Word | None = None  # that the recipe asks about
    metric: Word
    metric_unit: Word | None = None  # as `Measure.unit`; None: told by its name
    task: Word = ""  # of the arms, where it is named and no classification
    unit: Word = "image"  # of what is served: what one answer of the task is for
    # how much of the metric may be lost: points of a share of 1, else the metric's own unit
    margin: Annotated[float, Field(ge=0, le=1e9)]
    served: Annotated[int | float, Field(ge=1, le=1e18)]  # images of the full cycle
    comparisons: Annotated[int, Field(ge=0, le=10**6)]  # arms that have an interval
    lower_is_better: bool
    arms: Annotated[dict[Word, ArmResults], Field(min_length=1, max_length=100_000)]
    order: list[Word]
    totals: Totals
    incomplete: list[Unfinished]
    family: Family | None
    noise_floor: Floors | None = None
    label_seconds: dict[Word, LabelSeconds] = {}  # of the kinds that arms used

    @property
    def measure(self) -> Measure:
        """The metric with its unit and direction."""
        unit = named(self.metric).unit if self.metric_unit is None else self.metric_unit
        return Measure(self.metric, unit, not self.lower_is_better)

    @property
    def rows(self) -> dict[str, ArmResults]:
        """The arms in order."""
        return {label: self.arms[label] for label in self.order}

    def as_json(self) -> dict[str, Any]:
        """Return the content of results.json."""
        content = self.model_dump(mode="json", exclude_unset=True, by_alias=True)
        for row in content["arms"].values():
            row[self.metric] = row.pop("gain")
            if versus := row.get("vs_baseline"):
                gain, payback = versus["gain"], versus["payback"]
                row["vs_baseline"] = {**versus["ratios"], self.metric: gain, "payback": payback}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Results:
        """Return the results in the content of a results.json.

        Args:
            content: what `as_json` returns.

        Raises:
            pydantic.ValidationError: for what is none.
        """
        metric, arms = content.get("metric"), content.get("arms")
        rows = arms.items() if isinstance(arms, dict) else ()
        return cls.model_validate(
            {**content, "arms": {label: _typed(row, metric) for label, row in rows}}
        )


def _typed(row: Any, metric: Any) -> Any:
    """Return an arm of a file with the metric's own keys under the names of the fields."""
    if not (isinstance(row, dict) and isinstance(metric, str) and metric in row):
        return row
    versus = row.get("vs_baseline")
    if isinstance(versus, dict):
        ratios = {k: v for k, v in versus.items() if k not in (metric, "payback")}
        known = {"gain": versus.get(metric), "payback": versus.get("payback"), "ratios": ratios}
        row = {**row, "vs_baseline": known}
    return {k: v for k, v in row.items() if k != metric} | {"gain": row[metric]}


def problems(error: ValidationError) -> str:
    """Return in words what results cannot be, the first few."""
    return "; ".join(
        f"{'.'.join(one_line(p) for p in e['loc'])[:200]}: {e['msg']}"
        for e in error.errors()[:MOST_PROBLEMS]
    )
