"""What a results.json must be to be read: types, ranges, finite numbers, arms that are there.
Strangers write these, too.

`greenvis.report.schema` is the same for records, `greenvis.report.build` says what each value is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenvis.errors import BadInput, one_line
from greenvis.report.schema import is_plain

MOST_SAID = 3  # problems said of one file
MOST_DEPTH = 60  # of values: a recipe may be among them

_Word = Annotated[str, Field(max_length=10_000)]
_Float = Annotated[float, Field(ge=-1e30, le=1e30)]
_Number = _Float | None
_Count = Annotated[float, Field(ge=0, le=1e30)] | None
_Seeds = dict[_Word, _Float]
_Mapping = dict[str, Any]


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Reading(_Loose):
    value: _Number
    low: _Number
    high: _Number
    provenance: _Word | None
    method: _Word = ""
    reason: _Word = ""
    std: _Number = None
    spread: _Float = 0.0
    by_seed: _Seeds | None = None


class _Inference(_Reading):
    n: int = 0


class _Summary(_Loose):
    mean: _Number
    std: _Number
    n: Annotated[int, Field(ge=0)]


class _Gain(_Summary):
    by_seed: _Seeds


class _Change(_Loose):
    low: _Number
    high: _Number
    n: Annotated[int, Field(ge=0)]
    ratio: _Float = 1.0
    mean: _Float = 0.0


class _Payback(_Loose):
    verdict: Literal["at once", "pays back", "ahead until", "never", "not shown"]
    images: _Number
    low: _Number
    high: _Number
    seeds_agree: bool | None


class _Paybacks(_Loose):
    own: _Payback
    with_reuse: _Payback


class _Use(_Loose):
    role: _Word
    name: _Word
    energy_j: _Reading | _Mapping
    used_by_runs: int


class _Reuse(_Loose):
    whole_j: _Reading
    whole_g: _Reading
    shared_j: _Number
    shared_g: _Number


class _Spent(_Loose):
    energy_j: _Reading
    unfinished_energy_j: _Reading
    repeated_energy_j: _Reading
    older_inputs_energy_j: _Reading


class _Setting(_Loose):
    setting: _Word
    accuracy: _Summary
    inference_energy_j: _Number
    energy_ratio: _Number
    energy_spread: _Number
    macs: _Number
    macs_ratio: _Number
    realised: _Number
    exits: list[_Float]


class _Continual(_Loose):
    averages: list[_Number] = []
    energy_by_task_j: list[_Number] = []


class _Kept(_Loose):
    part: _Word | None
    misses: _Number
    hits: _Number
    earlier: _Number
    bytes: _Number


class _Sci(_Loose):
    e_kwh: _Number
    i_g_per_kwh: _Number
    m_g: _Number
    g_per_image: _Number


class _Planned(_Loose):
    value: _Number
    low: _Number
    high: _Number
    actual: _Number
    ratio: _Number
    n: int


class _Arm(_Loose):
    status: Literal["done", "partly done", "incomplete"]
    seeds: Annotated[list[int], Field(max_length=100_000)]
    attempts: dict[_Word, int]
    uses: list[_Use]
    train_energy_j: _Reading
    train_energy_with_reuse_j: _Reading
    total_energy_j: _Reading
    carbon_g: _Reading
    total_carbon_g: _Reading
    inference_energy_j: _Inference
    by_seed: dict[_Word, _Seeds]
    vs_baseline: dict[_Word, _Paybacks | _Change | None] | None
    spent: _Spent
    base_reuse: _Reuse | None
    sci: _Sci
    std: dict[_Word, _Number]
    zones: list[_Word]
    curve: dict[_Word, list[tuple[_Float, _Float]]]
    energy_by_phase_j: dict[_Word, _Number]
    energy_by_component_j: dict[_Word, _Reading]
    energy_to_baseline_j: _Mapping | None = None
    latency_ms: dict[_Word, _Number] | None
    techniques: list[_Word | dict[_Word, Any]] | None = None
    predicted: dict[_Word, _Planned] | None = None
    operating_points: list[_Setting] = []
    continual: _Continual | None = None
    kept: list[_Kept] = []
    task_accuracy: list[list[_Number]] | None = None
    macs: _Count
    params: _Count
    trainable_params: _Count
    delta_bytes: _Count
    train_flops: _Count
    images_per_s: _Count
    peak_memory_mb: _Count
    wall_s: _Count
    embodied_g: _Count
    network: list[Any] | None = None
    inputs: _Word | None = None
    assumed_grid: bool


class _Member(_Loose):
    own_j: _Number
    line_j: _Number


class _Link(_Loose):
    of: _Word
    on: _Word
    role: _Word


class _Family(_Loose):
    members: dict[_Word, _Member]
    links: list[_Link]


class _Overlapping(_Loose):
    starts: int
    seen_j: _Reading
    counted_j: _Reading


class _Totals(_Loose):
    energy_j: _Reading
    carbon_g: _Reading
    unfinished_energy_j: _Reading
    startup_j: _Reading | None = None
    starts: int = 0
    overlapping: _Overlapping | None = None
    runs: int
    attempts: dict[_Word, int]


class _Unfinished(_Loose):
    arm: _Word
    seed: int
    attempts: list[_Word]
    reason: _Word
    energy_j: _Reading


class _Check(_Loose):
    arm: _Word
    seed: int
    ratio: _Number
    own_j: _Number
    energy_j: _Number
    within_band: bool | None
    detail: _Mapping


class _Environment(_Loose):
    cpu: list[_Word | _Mapping]
    gpu: list[_Word | _Mapping]
    host: list[Any]
    os: list[Any]
    versions: list[_Mapping]
    world_size: list[Any]


class _Results(_Loose):
    name: _Word
    title: _Word | None
    note: Annotated[str, Field(max_length=100_000)] | None
    baseline: _Word | None
    metric: _Word
    margin: Annotated[float, Field(ge=0, le=1e9)]
    served: Annotated[float, Field(ge=1, le=1e18)]
    comparisons: Annotated[int, Field(ge=0, le=10**6)]
    lower_is_better: bool
    arms: Annotated[dict[_Word, _Arm], Field(min_length=1, max_length=100_000)]
    order: list[_Word]
    totals: _Totals
    incomplete: list[_Unfinished]
    family: _Family | None
    environment: _Environment
    command: list[_Word] | Annotated[str, Field(max_length=100_000)] | None
    commands: list[list[_Word] | Annotated[str, Field(max_length=100_000)]]
    recipe: list[Annotated[str, Field(max_length=10**6)] | _Mapping]
    git: list[Any]
    data: list[Any]
    models: list[Any]
    sources: list[_Mapping]
    carbon_intensity: list[_Mapping]
    pue: list[_Float]
    crosscheck: list[_Check]
    not_counted: list[_Word]
    notes: list[_Word]
    newest_run_s: Annotated[float, Field(ge=0, le=1e11)]
    damaged_lines: int
    missing_ranks: int
    steal_s: _Number
    cpu_s: _Number
    paused_s: _Count = None
    repriced: bool
    pricing_model: _Word
    noise_floor: dict[_Word, _Mapping | None] | None = None


def check(content: Any, path: Path) -> None:
    """Raise BadInput, naming file and place, where results are not what `greenvis.report.build`
    writes."""
    if not is_plain(content, most=MOST_DEPTH):
        raise BadInput(
            f"{path} is not a results.json of greenvis: numbers that are not finite, or nested too "
            "deeply"
        )
    try:
        read = _Results.model_validate(content)
        for label, row in content["arms"].items():
            _in_arm(row.get(read.metric), label)
            if row["uses"] and row["base_reuse"] is None:
                raise _Odd(
                    f"arms.{one_line(label)[:100]}: it uses others, and base_reuse is missing"
                )
            if any(
                row[key]["value"] is not None and "method" not in row[key]
                for key in ("train_energy_j", "carbon_g")
            ):
                raise _Odd(f"arms.{one_line(label)[:100]}: a reading without its method")
    except ValidationError as error:
        problems = [
            f"{'.'.join(one_line(p) for p in e['loc'])[:200]}: {e['msg']}"
            for e in error.errors()[:MOST_SAID]
        ]
        raise BadInput(
            f"{path} is not a results.json of greenvis: {'; '.join(problems)}"
        ) from error
    except _Odd as error:
        raise BadInput(f"{path} is not a results.json of greenvis: {error}") from error
    if sorted(read.order) != sorted(read.arms) or read.baseline not in (None, *read.arms):
        raise BadInput(
            f"{path} is not a results.json of greenvis: its order or its baseline names arms that "
            "are not there"
        )


class _Odd(Exception):
    pass


def _in_arm(gain: Any, label: str) -> None:
    try:
        _Gain.model_validate(gain)
    except ValidationError as error:
        raise _Odd(f"arms.{one_line(label)[:100]}: its metric is none") from error
