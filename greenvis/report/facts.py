"""What one run's record says, read by its keys here and nowhere else in the report: how it was made
(`Setup`), what it measured (`Facts`), what it builds on (`Ancestor`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from greenvis.meters.record import PROVENANCES, Reading
from greenvis.report.estimates import Free
from greenvis.tasks.base import Measure

COUNTS = ("misses", "hits", "earlier", "bytes")  # of outputs that were computed once
CONFLICT = ("disagreement", "kl", "cosine")  # between several teachers, one number per epoch
MOST = 1e30  # of a plain figure; larger ones are no measurement
BOUNDS = ("value", "low", "high")
MACHINE = ("cpu", "gpu", "os", "host", "versions", "world_size")


@dataclass(frozen=True)
class Setup:
    """What a header says of where and how a run was made."""

    name: str
    arm: str
    seed: int
    inputs: str
    number: int  # of the attempt
    start_s: float
    baseline: str | None
    components: list[Free]
    carbon_intensity: Free
    pue: float | None
    embodied: Any
    command: Any
    recipe: Any
    git: Any
    machine: dict[str, Any]  # by the names of `MACHINE`

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Setup:
        """Return what a header says."""
        clock, pue = header.get("clock_s", header.get("wall_s")), header.get("pue")
        name, baseline = str(header.get("name") or "run"), header.get("baseline")
        return cls(
            name=name,
            arm=str(header.get("arm") or name),
            seed=whole_number(header.get("seed")),
            inputs=str(header.get("inputs") or ""),
            number=whole_number(header.get("attempt")),
            start_s=float(clock) if is_number(clock) else 0.0,
            baseline=None if baseline is None else str(baseline),
            components=header.get("components") or [],
            carbon_intensity=header.get("carbon_intensity") or {},
            pue=float(pue) if isinstance(pue, (int, float)) else None,
            embodied=header.get("embodied"),
            command=header.get("command"),
            recipe=header.get("recipe"),
            git=header.get("git"),
            machine={key: header.get(key) for key in MACHINE},
        )


@dataclass(frozen=True)
class Ancestor:
    """A teacher or a base: its runs, its energy, and which runs it was used by (`of`)."""

    role: str
    name: str
    runs: tuple[str, ...]
    energy_j: Reading
    of: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What makes two lines the same thing."""
        return self.role, self.name, self.runs

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Ancestor:
        """Return what a `uses` line says."""
        name, runs, of = str(line.get("name")), line.get("runs"), line.get("of")
        return cls(
            str(line.get("role")),
            name,
            tuple(sorted(map(str, _list(runs)))),
            _reading(line.get("energy_j"), "reused", f"the cost of {name} is not known"),
            tuple(map(str, of or ())),
        )


@dataclass(frozen=True)
class Operated:
    """One setting of a model that can be switched after training."""

    setting: str
    accuracy: float | None  # or the primary metric of another task
    inference_energy_j: float | None
    spread: float | None
    macs: float | None
    exits: list[float] | None
    calls: float | None
    class_entropy: float | None

    @classmethod
    def read(cls, entry: Mapping[str, Any], metric: str) -> Operated:
        """Return what an entry of the fact `operating_points` says."""
        energy, exits = _mapping(entry.get("inference_energy_j")), entry.get("exits")
        return cls(
            str(entry["setting"]),
            number(entry.get(metric)),
            number(energy.get("value")),
            number(energy.get("spread")),
            number(entry.get("macs")),
            exits if isinstance(exits, list) and exits and all(map(is_number, exits)) else None,
            number(entry.get("network_calls")),
            number(entry.get("class_entropy")),
        )


@dataclass(frozen=True)
class Facts:
    """What a run measured and made, as far as it can be believed."""

    measures: list[Measure]  # of its task, the primary one first; [] where it names none
    task: str  # its name; "" where none is named
    unit: str  # of what the task answers for: "image", "bag"
    numbers: dict[str, float]  # plain figures by name: the metric, macs, params, …
    tests: dict[str, dict[str, float]]  # metrics by the name of the further test
    inference_energy_j: Reading | None  # per image
    inference_spread: float | None
    served: dict[str, Any]  # how: in batches of which size, and what learns while it answers
    latency_ms: dict[str, float]
    task_accuracy: list[list[Any]] | None
    task_energy_j: list[float | None]  # by experience, or by round of labels bought
    query: str  # by which labels were bought in rounds, such as "badge, warm"; "" where none were
    nearness: dict[str, float]  # of made images to real ones: see experiment.synthesis.nearness
    bought: list[dict[str, float]]  # "labels" so far and metrics, after each round
    techniques: list[str | Free]
    model: Any
    data: Any
    recipe: Any
    codecarbon: Free | None
    predicted: dict[str, dict[str, float]]  # value, low and high by quantity
    settings: dict[str, Operated]
    drawn: list[Free]  # images by setting
    outputs: list[Free]  # entries with `COUNTS` and "part"
    steps_cpu_s: dict[str, float]  # CPU seconds of what techniques did once, by its name
    conflicts: list[dict[str, list[float]]]
    teacher_weights: dict[str, float]

    def score(self, metric: str, test: str = "") -> float | None:
        """Return a metric on a further test; on the first where that is ""."""
        return (self.tests.get(test, {}) if test else self.numbers).get(metric)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Facts:
        """Return what a run's facts say; those that are mistyped are as if absent."""
        energy = facts.get("inference_energy_j")
        spread = number(_mapping(energy).get("spread"))
        served = _reading(energy, "fact", "")
        latency = facts.get("latency_ms")
        if isinstance(latency, (int, float)):
            latency = {"p50": latency}
        points, matrix = facts.get("operating_points"), facts.get("task_accuracy")
        recipe, measures = facts.get("recipe"), measures_of(facts)
        task, active, synthesis = (_mapping(facts.get(k)) for k in ("task", "active", "synthesis"))
        return cls(
            measures=measures,
            task=str(task.get("name") or ""),
            unit=str(task.get("unit") or "image"),
            numbers=_numbers(facts),
            tests={
                str(name): _numbers(by_metric)
                for name, by_metric in _mapping(facts.get("tests")).items()
                if isinstance(by_metric, Mapping)
            },
            inference_energy_j=None if served.value is None else served,
            served=_served(facts),
            inference_spread=spread if spread is not None and 0 <= spread < 1e3 else None,
            latency_ms={k: v for k, v in _mapping(latency).items() if isinstance(v, (int, float))},
            task_accuracy=matrix if _is_matrix(matrix) else None,
            task_energy_j=[number(joules) for joules in _list(facts.get("task_energy_j"))],
            query=str(active.get("query") or "")
            + (", warm" if active.get("retrain") == "warm" else ""),
            nearness={
                name: value
                for name in ("nearest_real", "real_apart", "copies")
                if (value := number(synthesis.get(name))) is not None
            },
            bought=[_numbers(row) for row in _list(active.get("bought"))],
            techniques=[t for t in _list(facts.get("techniques")) if isinstance(t, (str, dict))],
            model=facts.get("model"),
            data=facts.get("data"),
            recipe=recipe if isinstance(recipe, (str, dict)) else None,
            codecarbon=_crosscheck(facts.get("codecarbon")),
            predicted={
                quantity: {b: float(band[b]) for b in BOUNDS}
                for quantity, band in _mapping(facts.get("predicted")).items()
                if isinstance(band, Mapping) and all(is_number(band.get(b)) for b in BOUNDS)
            },
            settings=_settings(points, measures),
            drawn=[dict(e) for e in _list(facts.get("drawn")) if isinstance(e, Mapping)],
            outputs=_outputs(facts),
            steps_cpu_s={
                name: seconds
                for fact in facts.values()
                for name, seconds in _numbers(_mapping(fact).get("cpu_s")).items()
            },
            conflicts=[
                {measure: value[measure] for measure in CONFLICT}
                for value in facts.values()
                if isinstance(value, Mapping) and all(_are_numbers(value.get(m)) for m in CONFLICT)
            ],
            teacher_weights=next(
                (
                    dict(value)
                    for key, value in facts.items()
                    if key.endswith("_teachers")
                    and isinstance(value, Mapping)
                    and _are_numbers([*value.values()])
                ),
                {},
            ),
        )


def _served(facts: Mapping[str, Any]) -> dict[str, Any]:
    adapts = _list(facts.get("adapts"))
    size = number(_mapping(facts.get("inference")).get("batch_size"))
    out = {"batch_size": size, "adapts": sorted(str(a)[:100] for a in adapts[:10])}
    return {key: value for key, value in out.items() if value}


def _crosscheck(value: Any) -> Free | None:
    """Return what codecarbon read beside."""
    if isinstance(value, (int, float)):
        return {"energy_j": value}
    return dict(value) if isinstance(value, Mapping) else None


def _settings(points: Any, measures: list[Measure]) -> dict[str, Operated]:
    metric = measures[0].name if measures else "accuracy"
    entries = [e for e in _list(points) if isinstance(e, Mapping) and "setting" in e]
    return {str(entry["setting"]): Operated.read(entry, metric) for entry in entries}


def _outputs(facts: Mapping[str, Any]) -> list[Free]:
    """Return what any fact says of outputs that were kept."""
    entries = [e for v in facts.values() for e in (v if isinstance(v, list) else [v])]
    return [
        dict(entry)
        for entry in entries
        if isinstance(entry, Mapping) and all(isinstance(entry.get(k), int) for k in COUNTS)
    ]


def measures_of(facts: Mapping[str, Any]) -> list[Measure]:
    """Return the metrics of the task that a record names, the primary one first."""
    return [
        Measure(m["name"], m.get("unit", "%"), m.get("higher_is_better", True))
        for m in _list(_mapping(facts.get("task")).get("metrics"))
    ]


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number that can be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST


def number(value: Any) -> float | None:
    """Return a finite number of a record, None for anything else."""
    return float(value) if is_number(value) else None


def whole_number(value: Any) -> int:
    """Return a whole number of a record, 0 for anything else."""
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _numbers(value: Any) -> dict[str, float]:
    """Return the plain figures of a section of a record."""
    return {k: float(v) for k, v in _mapping(value).items() if is_number(v)}


def _reading(value: Any, method: str, reason: str) -> Reading:
    """Return an energy of a record: a number, or a mapping with its band."""
    entry = {"value": value} if isinstance(value, (int, float)) else _mapping(value)
    v, provenance = entry.get("value"), entry.get("provenance")
    if not isinstance(v, (int, float)):
        return Reading("energy_j", None, reason=reason)
    return Reading(
        "energy_j",
        v,
        entry.get("low", v),
        entry.get("high", v),
        method if method == "reused" else str(entry.get("method") or method),
        provenance if provenance in PROVENANCES else "estimated",
    )


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(map(is_number, value))
