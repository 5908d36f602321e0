"""What figures in results are made of: an estimate with its band, a mean over seeds, a comparison
with the baseline and its interval."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Word = Annotated[str, Field(max_length=10_000)]
Text = Annotated[str, Field(max_length=10**6)]  # reasons and methods of many runs
Float = Annotated[float, Field(ge=-1e100, le=1e100)]
Number = Float | None
Count = Annotated[float, Field(ge=0, le=1e100)] | None
Seeds = dict[Word, Float]
Free = dict[str, Any]  # of a record: a recipe, a component, what an environment says of itself
Command = list[Word] | Annotated[str, Field(max_length=100_000)]
N = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of the content of results.json. What a file holds beyond its fields is kept."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """Return what a file holds of it: what was set, and no default."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)


class Estimate(Part):
    """A reading with its band: a mean over seeds, or a sum. `spread`: how far repeated readings
    scatter, a share."""

    value: Number
    low: Number
    high: Number
    provenance: Word | None
    method: Text = ""
    reason: Text = ""
    std: Number = None
    n: int = 0
    spread: Float = 0.0
    by_seed: Seeds | None = None

    @property
    def seeds(self) -> Seeds:
        """Values by seed, {} where there are none."""
        return self.by_seed or {}


class Summary(Part):
    """Mean and sample standard deviation (None for fewer than two) over n seeds."""

    mean: Number
    std: Number
    n: N


class Gain(Summary):
    """The metric of an arm."""

    by_seed: Seeds


class FurtherMetric(Summary):
    """Another metric of the task, or the metric on a further test."""

    metric: Word
    test: Word = ""  # the name of the further test; "" for the first
    unit: Word
    higher_is_better: bool


class ToTarget(Summary):
    """Joules at which an arm reached the baseline's final metric and stayed there."""

    target: Float
    not_reached: N


class Ratio(Part):
    """An arm's quantity ÷ the baseline's: geometric means and interval. n: seeds of the arm."""

    same: ClassVar[float] = 1.0
    ratio: Float
    low: Number
    high: Number
    n: N


class Difference(Part):
    """The metric of an arm − the baseline's, and what its interval decides. n: seeds of the arm."""

    same: ClassVar[float] = 0.0
    mean: Float
    low: Number
    high: Number
    n: N
    verdict: Literal["keeps", "loses", "not yet decided"] = "not yet decided"
    more_seeds: int | None = None


class LabelSeconds(Part):
    """What a label of one kind takes a person, in seconds. asked: by the reader of the report."""

    low: Annotated[float, Field(ge=0, le=1e9)]
    central: Annotated[float, Field(ge=0, le=1e9)]
    high: Annotated[float, Field(ge=0, le=1e9)]
    source: Word = ""
    asked: bool = False


class Payback(Part):
    """After how many images an arm is ahead; "not shown" where one image costs the same for all we
    know."""

    verdict: Literal["at once", "pays back", "ahead until", "never", "not shown"]
    images: Number
    low: Number = None
    high: Number = None
    seeds_agree: bool | None = None


class Paybacks(Part):
    """With an arm's own training, and with all it builds on."""

    own: Payback
    with_reuse: Payback


class Versus(Part):
    """An arm beside the baseline. Intervals hold together with those of all `comparisons` arms with
    95 % (`stats.differences`); None for one seed."""

    gain: Difference | None
    payback: Paybacks | None
    ratios: dict[Word, Ratio | None]

    def ratio(self, quantity: str) -> Ratio | None:
        """Return the ratio of a quantity ("train_energy"); None where it is not compared."""
        return self.ratios.get(quantity)
