"""What results say of one arm."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from greenvis.report.estimates import (
    Count,
    Difference,
    Estimate,
    Float,
    FurtherMetric,
    Gain,
    Number,
    Part,
    Ratio,
    Seeds,
    Summary,
    ToTarget,
    Versus,
    Word,
)


class Use(Part):
    """What an arm builds on (a teacher, a base); `energy_j.value` is None where nobody knows."""

    role: Word
    name: Word
    runs: list[Word] = []
    energy_j: Estimate
    used_by_runs: int
    of: list[Word] = []


class Reuse(Part):
    """The cost of what an arm builds on: charged whole, and shared among the runs that use it."""

    whole_j: Estimate
    whole_g: Estimate
    shared_j: Number
    shared_g: Number


class Spent(Part):
    """Sums of all starts of an arm: nothing is left out."""

    energy_j: Estimate
    carbon_g: Estimate | None = None
    unfinished_energy_j: Estimate
    repeated_energy_j: Estimate
    older_inputs_energy_j: Estimate
    attempts: int = 0


class Setting(Part):
    """One setting of a model that can be switched after training. Ratios are to the setting
    "never", of the same seed; `realised` is energy saved ÷ MACs saved; `exits` the share of the
    images that leaves at each; `energy_spread` the scatter of the passes about the ratio, a share
    of it."""

    setting: Word
    accuracy: Summary
    inference_energy_j: Number
    energy_ratio: Number
    energy_spread: Number
    macs: Number
    macs_ratio: Number
    realised: Number
    exits: list[Float]
    calls: Number = None  # of a network per image drawn
    class_entropy: Number = None  # in bits, of what was drawn


class Picture(Part):
    """Images that a model drew at one setting: bytes (count, channels, height, width), compressed
    by zlib, as base64."""

    setting: Word
    shape: tuple[int, int, int, int]
    pixels: Annotated[str, Field(max_length=200_000)]


class Continual(Part):
    """Learning task after task: metrics over seeds, and means over seeds by task."""

    averages: list[Number] = []
    energy_by_task_j: list[Number] = []
    average_incremental_accuracy: Summary | None = None
    forgetting: Summary | None = None
    forgetting_first: Summary | None = None
    backward_transfer: Summary | None = None
    plasticity: Summary | None = None
    task_energy_j: Summary | None = None
    accuracy_per_kj: Summary | None = None
    buffer_bytes: Summary | None = None

    @property
    def all_at_once(self) -> bool:
        """Whether the arm trained on all tasks at once (joint), a bound that no stream allows: it
        knows the last accuracy only."""
        before = self.averages[:-1]
        return bool(before) and all(value is None for value in before)


class Outputs(Part):
    """Images whose outputs of a frozen part were computed (misses) and read back (hits), and how
    many of those an earlier run had computed."""

    part: Word | None
    misses: Number
    hits: Number
    earlier: Number
    bytes: Number


class Teachers(Part):
    """Several teachers of one arm: each measure of conflict in the first and in the last epoch, and
    learned weights by teacher."""

    conflict: dict[Word, tuple[Float, Float]] = {}
    weights: dict[Word, Float] = {}


class Sci(Part):
    """Software Carbon Intensity (ISO/IEC 21031) of one image."""

    e_kwh: Number
    i_g_per_kwh: Number
    m_g: Number
    r: Word = ""
    g_per_image: Number


class Cycle(Part):
    """Making a model once and using it on `served` images."""

    served: int | Float
    make_j: Number
    reuse_whole_j: Number
    reuse_shared_j: Number
    serve_j: Number
    total_whole_j: Number
    total_shared_j: Number
    wh_per_1000_images: Number


class Planned(Part):
    """What `greenvis plan` predicted of one seed, and the mean that it came to; `ratio` is actual ÷
    predicted."""

    value: Float
    low: Float
    high: Float
    actual: Float
    ratio: Number
    inside: bool = False
    n: int


class Labels(Part):
    """Labels of one kind for one purpose: means over finished seeds."""

    kind: Word
    why: Word
    count: Count
    by_seed: Seeds = {}


class LabelRound(Part):
    """A training in the course of buying labels: all labels so far, the metric after it, and what
    it took, with the choice of its images."""

    labels: Float
    gain: Gain
    energy_j: Seeds = {}


class ArmResults(Part):
    """One arm: means over finished seeds."""

    gain: Gain
    status: Literal["done", "partly done", "incomplete"]
    seeds: Annotated[list[int], Field(max_length=100_000)]
    attempts: dict[Word, int]
    uses: list[Use]
    train_energy_j: Estimate  # all that led to the result but measurement
    train_energy_with_reuse_j: Estimate  # with all it builds on whose cost is known
    total_energy_j: Estimate
    carbon_g: Estimate  # of train_energy_j
    total_carbon_g: Estimate
    inference_energy_j: Estimate  # of one image
    by_seed: dict[Word, Seeds]  # what is compared and has no values by seed above
    vs_baseline: Versus | None = None
    spent: Spent
    base_reuse: Reuse | None
    sci: Sci
    full_cycle: Cycle | None = None
    std: dict[Word, Number]  # standard deviations of what a busy machine disturbs
    zones: list[Word]
    curve: dict[Word, list[tuple[Float, Float]]]  # by seed: joules, metric
    energy_by_phase_j: dict[Word, Float]
    energy_by_component_j: dict[Word, Estimate]
    energy_to_baseline_j: ToTarget | None = None
    latency_ms: dict[Word, Number] | None
    techniques: list[Word | dict[Word, Any]] | None = None
    predicted: dict[Word, Planned] | None = None
    operating_points: list[Setting] = []
    drawn: Annotated[list[Picture], Field(max_length=100)] = []  # of the first seed
    continual: Continual | None = None
    outputs: Annotated[list[Outputs], Field(alias="kept")] = []
    teachers: Teachers | None = None
    task_accuracy: list[list[Number]] | None = None
    further: list[FurtherMetric] = []
    labels: list[Labels] = []
    images: dict[Word, Count] = {}  # by role
    query: Word = ""  # by which labels were bought in rounds
    label_rounds: list[LabelRound] = []
    nearness: dict[Word, Number] = {}  # of made images to real ones
    macs: Count
    params: Count
    trainable_params: Count
    delta_bytes: Count
    train_flops: Count
    images_per_s: Count
    peak_memory_mb: Count
    wall_s: Count
    embodied_g: Count
    # the same in two arms: the same finished network, the same work
    network: list[Any] | None = None
    inputs: Word | None = None
    assumed_grid: bool

    @property
    def unknown(self) -> list[str]:
        """Names of what it builds on at a cost that nobody knows: the weights of others."""
        return list(dict.fromkeys(u.name for u in self.uses if u.energy_j.value is None))

    def latency_s(self, quantile: str) -> float | None:
        """Return the latency of a quantile ("p50") in seconds."""
        value = (self.latency_ms or {}).get(quantile)
        return None if value is None else value / 1e3

    def ratio(self, quantity: str) -> Ratio | None:
        """Return the ratio of a quantity to the baseline's; None where there is none."""
        return self.vs_baseline.ratio(quantity) if self.vs_baseline else None

    @property
    def difference(self) -> Difference | None:
        """The metric beside the baseline's; None where there is none."""
        return self.vs_baseline.gain if self.vs_baseline else None

    @property
    def technique_names(self) -> list[str]:
        """Names of its techniques."""
        return [t if isinstance(t, str) else next(iter(t), "") for t in self.techniques or ()]
