"""What a record must be to be believed: types, ranges, finite numbers. Strangers write records, and
disks break."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenvis.errors import BadInput, printable
from greenvis.meters.labels import Kind, Purpose, Role
from greenvis.meters.record import UNSEEN, Run

MOST = 1e18  # of any total: joules, seconds, FLOPs in thousands of millions of millions
MOST_DEPTH = 12
MOST_SAID = 5  # problems said of one record

_Word = Annotated[str, Field(max_length=1000)]
_Short = Annotated[str, Field(max_length=100)]
_Count = Annotated[float, Field(ge=0, le=1e24)]
_Moment = Annotated[float, Field(ge=0, le=1e12)]


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Band(_Loose):
    value: _Count | None = None
    low: _Count | None = None
    high: _Count | None = None
    provenance: _Word | None = None


class _Coefficient(_Loose):
    low: _Count | None = None
    central: _Count | None = None
    high: _Count | None = None


class _Component(_Loose):
    name: _Word
    source: _Word | None = None
    scope: _Word | None = None
    observation: _Word | None = None
    coefficient: _Coefficient | None = None
    repeatability: _Coefficient | None = None
    provenance: Literal["measured", "estimated", "constant", "partly unknown"] = "estimated"
    reason: _Word | None = None
    citation: Annotated[str, Field(max_length=5000)] | None = None
    devices: Annotated[list[_Word], Field(max_length=1000)] | None = None


class _Intensity(_Loose):
    value: Annotated[float, Field(ge=0, le=1e5)] | None = None
    low: Annotated[float, Field(ge=0, le=1e5)] | None = None
    high: Annotated[float, Field(ge=0, le=1e5)] | None = None
    zone: _Word | None = None
    source: _Word | None = None
    assumed: bool | None = None


class _Embodied(_Loose):
    kg: _Count
    lifetime_years: Annotated[float, Field(gt=0, le=1000)] = 4.0
    share: Annotated[float, Field(ge=0, le=1)] = 1.0


class _Header(_Loose):
    run: _Word
    name: _Word | None = None
    arm: _Word | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    inputs: _Word | None = None
    attempt: Annotated[int, Field(ge=-(10**6), le=10**6)] = 1
    rank: Annotated[int, Field(ge=0, lt=10**5)] = 0
    world_size: Annotated[int, Field(ge=1, le=10**5)] = 1
    host: _Word | None = None
    boot_id: _Word | None = None
    pid: Annotated[int, Field(ge=0)] | _Word | None = None
    parents: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=10_000)] | None = None
    clock_s: _Moment | None = None
    mono_s: _Moment | None = None
    nested_in: _Word | None = None
    versions: dict[str, _Word] | None = None
    cpu: dict[str, Any] | None = None
    command: list[_Word] | Annotated[str, Field(max_length=100_000)] | None = None
    git: _Word | dict[str, Any] | None = None
    baseline: _Word | None = None
    recipe: Annotated[str, Field(max_length=10**6)] | dict[str, Any] | None = None
    components: Annotated[list[_Component], Field(max_length=100)] | None = None
    pue: Annotated[float, Field(ge=1, le=100)] | None = None
    carbon_intensity: _Intensity | None = None
    embodied: _Embodied | None = None


_Seen = Annotated[dict[_Word, float], Field(max_length=1000)]  # observations by quantity


class _Served(_Loose):
    batch_size: _Count | None = None
    rounds: Annotated[list[_Seen], Field(max_length=100_000)]


class _Measure(_Loose):
    name: _Short
    unit: _Short = "%"
    higher_is_better: bool = True


class _Task(_Loose):
    name: _Short
    unit: _Short = "image"
    metrics: Annotated[list[_Measure], Field(min_length=1, max_length=100)]


class _Bought(_Loose):
    labels: _Count


class _Active(_Loose):
    query: _Short
    bought: Annotated[list[_Bought], Field(max_length=10_000)]


class _Facts(_Loose):
    task: _Task | None = None
    inference: _Served | None = None
    task_observed: Annotated[list[_Seen | None], Field(max_length=10_000)] | None = None
    active: _Active | None = None
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    latency_ms: dict[str, _Count] | None = None
    inference_energy_j: _Band | None = None
    operating_points: Annotated[list[dict[str, Any]], Field(max_length=1000)] | None = None
    predicted: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    codecarbon: dict[str, Any] | None = None
    task_accuracy: Annotated[list[list[float | None]], Field(max_length=10_000)] | None = None
    techniques: list[Any] | None = None
    train: dict[str, Any] | None = None
    macs: _Count | None = None
    params: _Count | None = None
    trainable_params: _Count | None = None
    delta_bytes: _Count | None = None
    peak_memory_mb: _Count | None = None
    images_per_s: _Count | None = None
    threads: _Count | None = None
    epochs: _Count | None = None


class _Observed(_Loose):
    components: Annotated[list[_Component], Field(max_length=100)] | None = None
    totals: _Seen


class _Use(_Loose):
    role: _Word
    name: _Word
    runs: Annotated[list[_Word], Field(max_length=10_000)]
    energy_j: _Band | None = None
    observed: Annotated[list[_Observed], Field(max_length=1000)] | None = None
    of: list[_Word] | None = None


class _Labels(_Loose):
    kind: Kind
    why: Purpose
    name: _Word = ""
    count: _Count


class _Images(_Loose):
    role: Role
    name: _Word = ""
    count: _Count


def check(run: Run) -> list[str]:
    """Leave out of a record what cannot be, and return in words what that was. Raises BadInput
    where its header cannot be."""
    problems = _problems(_Header, run.header)
    if problems:
        raise BadInput(f"{run.path}: its header cannot be believed: {_said(problems)}")
    out: list[str] = []
    for key, why in _problems(_Facts, run.facts).items():
        run.facts.pop(key, None)
        out.append(f"its fact '{key}' {why}")
    uses = [use for use in run.uses if not _problems(_Use, use)]
    if len(uses) < len(run.uses):
        out.append(f"{len(run.uses) - len(uses)} of the runs it says it uses")
        run.uses[:] = uses
    for what, kind, lines in (("labels", _Labels, run.labels), ("images", _Images, run.images)):
        good = [line for line in lines if not _problems(kind, line)]
        if len(good) < len(lines):
            out.append(f"{len(lines) - len(good)} of its lines on {what}")
            lines[:] = good
    logs = [
        log
        for log in run.logs
        if is_plain({key: value for key, value in log.items() if key != "totals"})
    ]
    if len(logs) < len(run.logs):
        out.append(f"{len(run.logs) - len(logs)} of its logs, not finite or nested too deeply")
        run.logs[:] = logs
    odd = [
        phase
        for phase, totals in run.totals.items()
        if not all(possible(q, value) for q, value in totals.items())
    ]
    for phase in odd:
        del run.totals[phase]
        out.append(f"its phase '{phase}', with totals below 0 or beyond all measure")
    return [f"{run.path.name}: left out: {printable(line)}" for line in out[:MOST_SAID]]


def possible(quantity: str, value: float) -> bool:
    """Whether a total can be; only seconds that a counter did not see may be made up for in another
    phase."""
    return (-MOST if quantity.endswith(UNSEEN) else 0) <= value <= MOST


def _problems(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, str]:
    """Return what is wrong, by top-level key."""
    out = {
        str(key): "is nested too deeply or not finite"
        for key, value in values.items()
        if not is_plain(value)
    }
    try:
        kind.model_validate(values)
    except ValidationError as error:
        for problem in error.errors():
            out.setdefault(
                str(problem["loc"][0]),
                f"is refused: {problem['msg'][:1].lower() + problem['msg'][1:]}",
            )
    return out


def _said(problems: Mapping[str, str]) -> str:
    return "; ".join(f"{printable(key)} {why}" for key, why in [*problems.items()][:MOST_SAID])


def is_plain(value: Any, depth: int = 0, most: int = MOST_DEPTH) -> bool:
    """Whether a value of JSON is finite, whole numbers fit a float, and it is not nested without
    end."""
    if depth > most:
        return False
    if isinstance(value, dict):
        return all(is_plain(inner, depth + 1, most) for inner in value.values())
    if isinstance(value, list):
        return all(is_plain(inner, depth + 1, most) for inner in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 10**300
