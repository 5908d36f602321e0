"""One arm's numbers out of its seed runs: means over seeds, every joule kept, what is missing
said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from greenvis.meters import pricing
from greenvis.meters.record import Reading
from greenvis.report import (
    cached_outputs,
    comparison,
    continual,
    forecast,
    measures,
    pictures,
    reuse,
    settings,
    stats,
)
from greenvis.report.arm_results import ArmResults, LabelRound, Labels, Spent
from greenvis.report.estimates import Estimate, FurtherMetric, Gain
from greenvis.report.facts import Facts
from greenvis.report.runs import Arm, RunSummary
from greenvis.report.sums import mean_reading, sum_reading
from greenvis.report.teachers import teachers

STEP = "cpu_s of "  # before the name of what a technique did once
PLAIN = ("macs", "params", "trainable_params", "delta_bytes", "images_per_s", "peak_memory_mb")

Intensity = Mapping[str, Any]
Value = Callable[[RunSummary], float | None]


def per_seed(arm: Arm, value: Callable[[int], float | None]) -> dict[int, float]:
    """Return a number by finished seed, leaving out seeds where it is missing or not finite."""
    values = {seed: value(seed) for seed in arm.done}
    return {s: float(v) for s, v in values.items() if v is not None and math.isfinite(v)}


def results(
    arm: Arm,
    metric: str,
    grid: Intensity | None,
    users: Mapping[reuse.Key, int],
    target: float | None,
    lower_is_better: bool,
) -> ArmResults:
    """Return what the results say of one arm; how it compares with the baseline is added later.

    users: how many finished seed runs use each teacher or base. target: the baseline's metric.
    """
    done, last = arm.done, next(iter(arm.finished.values()), None)
    train = {s: run.training_energy_j for s, run in done.items()}
    carbon = [_grams(run.chain, grid, training=True) for run in done.values()]
    energy = mean_reading(train.values(), {s: r.value for s, r in train.items()})
    serving, carbon_g = _inference(arm), mean_reading(carbon)
    plain = {k: of(arm) for k, of in COMPARED.items()}
    means = {k: stats.summary(plain[k]).mean for k in plain}
    latency = _latency(arm)
    return ArmResults(
        gain=_gain(arm, metric),
        status="done" if len(done) == len(arm.runs) else "partly done" if done else "incomplete",
        seeds=sorted(done),
        attempts=dict(sorted(Counter(a.status for r in arm.runs for a in r.attempts).items())),
        train_energy_j=energy,
        total_energy_j=mean_reading(r.total_energy_j for r in done.values()),
        carbon_g=carbon_g,
        total_carbon_g=mean_reading(_grams(r.chain, grid) for r in done.values()),
        energy_by_phase_j=_by_stage(arm),
        energy_by_component_j=_by_component(arm),
        spent=_spent(arm, grid),
        inference_energy_j=serving,
        embodied_g=stats.summary(_embodied_g(arm)).mean,
        latency_ms=latency,
        wall_s=means["wall"],
        train_flops=means["train_flops"],
        **{k: means[k] for k in PLAIN},
        std={k: stats.summary(plain[of]).std for k, of in TIMED.items()},
        by_seed={k: text_keys(v) for k, v in (plain | _steps(arm)).items()},
        zones=sorted({str(z) for g in _grids(arm, grid) if (z := g.get("zone"))}),
        assumed_grid=any(g.get("assumed") for g in _grids(arm, grid)),
        # the same in two arms: the same work, the same finished network
        inputs=None if arm.runs[0].tracked else arm.runs[0].inputs or None,
        network=_network(last, means),
        energy_to_baseline_j=comparison.to_target(arm, target, lower_is_better),
        curve={str(s): comparison.thin(comparison.curve(r)) for s, r in done.items()},
        sci=comparison.sci(
            energy.value, carbon_g.value, serving.value, means["images_per_s"], last
        ),
        **reuse.reuse(list(done.values()), users, grid),
        **_where_present(arm, metric, grid),
    )


def _where_present(arm: Arm, metric: str, grid: Intensity | None) -> dict[str, Any]:
    """Return what only some arms have."""
    facts = {seed: run.facts for seed, run in arm.finished.items()}
    matrices = {s: f.task_accuracy for s, f in facts.items() if f.task_accuracy}
    train = {s: r.training_energy_j.value for s, r in arm.done.items()}
    out = {
        "continual": continual.summary(facts, train) if matrices else None,
        "task_accuracy": continual.mean_matrix(list(matrices.values())) if matrices else None,
        "techniques": [*facts.values()][-1].techniques if facts else None,
        "kept": cached_outputs.means(f.outputs for f in facts.values()),
        "teachers": teachers(list(facts.values())),
        "predicted": forecast.predicted(list(arm.done.values()), grid),
        "operating_points": settings.settings(arm),
        "drawn": pictures.pictures(next((f.drawn for f in facts.values()), [])),
        "further": _further(arm, metric),
        "labels": _labels(arm),
        "images": _images(arm),
        "query": next((f.query for f in facts.values()), ""),
        "label_rounds": _label_rounds(arm, metric),
        "nearness": _nearness([*facts.values()]),
    }
    return {key: value for key, value in out.items() if value}


def _further(arm: Arm, metric: str) -> list[FurtherMetric]:
    """Return the task's other metrics, and the metric on further tests."""
    every = [run.facts for run in arm.finished.values()]
    known = {m.name: m for facts in every for m in facts.measures}
    tests = dict.fromkeys(test for facts in every for test in facts.tests)
    wanted = [(m, "") for m in known.values() if m.name != metric]
    wanted += [(known.get(metric) or measures.named(metric), test) for test in tests]
    out = []
    for measure, test in wanted:
        scores = _by_seed(arm, lambda run, m=measure.name, t=test: run.facts.score(m, t))
        if scores:
            s = stats.summary(scores)
            out.append(FurtherMetric(metric=measure.name, test=test, unit=measure.unit,
                                     higher_is_better=measure.higher_is_better,
                                     mean=s.mean, std=s.std, n=s.n))  # fmt: skip
    return out


def _labels(arm: Arm) -> list[Labels]:
    """Return labels by kind and purpose; a seed that used none of them counts 0."""
    known = {s: c.labels for s, run in arm.done.items() if (c := run.counts)}
    out = []
    for kind, why in sorted({key for used in known.values() for key in used}):
        seeds = {s: used.get((kind, why), 0.0) for s, used in known.items()}
        mean = stats.summary(seeds).mean
        out.append(Labels(kind=kind, why=why, count=mean, by_seed=text_keys(seeds)))
    return out


def _images(arm: Arm) -> dict[str, float | None]:
    """Return images by role, means over seeds."""
    known = {s: c.images for s, run in arm.done.items() if (c := run.counts)}
    roles = sorted({role for used in known.values() for role in used})
    return {
        r: stats.summary({s: used.get(r, 0.0) for s, used in known.items()}).mean for r in roles
    }


def _nearness(facts: Sequence[Facts]) -> dict[str, float]:
    """Return how near made images come to real ones, means over seeds that all know it."""
    names = dict.fromkeys(name for one in facts for name in one.nearness)
    return {n: math.fsum(f.nearness.get(n, math.nan) for f in facts) / len(facts) for n in names}


def _label_rounds(arm: Arm, metric: str) -> list[LabelRound]:
    """Return the rounds in which labels were bought, of those seeds that bought as many."""
    facts = {seed: run.facts for seed, run in arm.finished.items() if run.facts.bought}
    out = []
    for i, first in enumerate(next(iter(facts.values())).bought if facts else ()):
        count = first.get("labels", 0.0)
        alike = {
            s: f for s, f in facts.items() if i < len(f.bought) and f.bought[i]["labels"] == count
        }
        scores = {s: f.bought[i][metric] for s, f in alike.items() if metric in f.bought[i]}
        joules = {s: f.task_energy_j[i] for s, f in alike.items() if i < len(f.task_energy_j)}
        known = {s: j for s, j in joules.items() if j is not None}
        out.append(LabelRound(labels=count, gain=_scored(scores), energy_j=text_keys(known)))
    return out


def _gain(arm: Arm, metric: str) -> Gain:
    return _scored(_by_seed(arm, lambda run: run.metric(metric)))


def _scored(scores: dict[int, float]) -> Gain:
    s = stats.summary(scores)
    return Gain(mean=s.mean, std=s.std, n=s.n, by_seed=text_keys(scores))


def _by_seed(arm: Arm, value: Value) -> dict[int, float]:
    """Return a number of each seed's finished attempt."""
    return per_seed(arm, lambda seed: value(arm.finished[seed]))


def _fact(name: str) -> Callable[[Arm], dict[int, float]]:
    return lambda arm: _by_seed(arm, lambda run: run.facts.numbers.get(name))


def _steps(arm: Arm) -> dict[str, dict[int, float]]:
    """Return CPU seconds of what techniques did once, by `STEP` and its name."""
    names = dict.fromkeys(n for run in arm.finished.values() for n in run.facts.steps_cpu_s)
    return {
        f"{STEP}{n}": _by_seed(arm, lambda run, n=n: run.facts.steps_cpu_s.get(n)) for n in names
    }


def _grids(arm: Arm, grid: Intensity | None) -> list[Intensity]:
    return [grid or a.setup.carbon_intensity for r in arm.done.values() for a in r.chain]


def _grams(chain: list[RunSummary], grid: Intensity | None, training: bool = False) -> Reading:
    """Return the CO2e of the attempts that led to a result."""
    joules = ((a, a.training_energy_j if training else a.total_energy_j) for a in chain)
    return pricing.add((a.grams(j, grid) for a, j in joules), "carbon_g")


def _network(last: RunSummary | None, means: Mapping[str, float | None]) -> list[Any] | None:
    """Return what is the same in two arms whose finished networks are, and answer alike; None where
    the records do not say."""
    model = last.facts.model if last else None
    if not isinstance(model, Mapping):
        return None
    same = [model.get("ref"), model.get("options"), means["macs"], means["params"]]
    return [*same, last.facts.served] if last and last.facts.served else same


def text_keys(values: Mapping[int, float]) -> dict[str, float]:
    """Return figures by seed with keys as JSON has them."""
    return {str(s): v for s, v in values.items()}


def _wall(arm: Arm) -> dict[int, float]:
    """Seconds of the attempts that led to a result, measurement left out."""
    seconds = {s: [t for a in run.chain for t in a.seconds()] for s, run in arm.done.items()}
    return per_seed(arm, lambda seed: math.fsum(seconds[seed]) if seconds[seed] else None)


def _train_flops(arm: Arm) -> dict[int, float]:
    """FLOPs counted while training (all attempts, a teacher's included), else the fact of that
    name."""
    counts = {
        seed: [
            flops
            for a in run.chain
            for stage, totals in a.totals.items()
            if stage in ("train", "teacher") and (flops := totals.get("flops"))
        ]
        for seed, run in arm.done.items()
    }
    return _fact("train_flops")(arm) | {s: math.fsum(c) for s, c in counts.items() if c}


def _latency_p50(arm: Arm) -> dict[int, float]:
    """Median milliseconds of one call, as measured after the training."""
    return _by_seed(arm, lambda run: run.facts.latency_ms.get("p50"))


def _latency(arm: Arm) -> dict[str, float | None] | None:
    """Return the seeds' mean latency in milliseconds by quantile, None where none was measured."""
    keys = sorted({k for run in arm.finished.values() for k in run.facts.latency_ms})
    runs = {s: run.facts.latency_ms for s, run in arm.finished.items()}
    means = {k: stats.summary({s: ms[k] for s, ms in runs.items() if k in ms}).mean for k in keys}
    return means or None


def _embodied_g(arm: Arm) -> dict[int, float]:
    """Grams of CO2e of making the machine that fall on the time a result took."""
    shares = {
        seed: [a.embodied_g(t) for a in run.chain for t in a.seconds()]
        for seed, run in arm.done.items()
    }
    known = {s: [g for g in grams if g is not None] for s, grams in shares.items()}
    return {s: math.fsum(g) for s, g in known.items() if g and len(g) == len(shares[s])}


def _by_stage(arm: Arm) -> dict[str, float]:
    """Mean joules by stage over seeds; a seed without the stage counts 0 there, so the stages add
    up to the total."""
    done = list(arm.done.values())
    out = {}
    for name in sorted({s for r in done for a in r.chain for s in a.energy}):
        parts = ([x for a in r.chain for x in a.energy.get(name, {}).values()] for r in done)
        out[name] = math.fsum(pricing.add(p).value or 0.0 for p in parts) / len(done)
    return out


def _by_component(arm: Arm) -> dict[str, Estimate]:
    done = list(arm.done.values())
    names = sorted({c for r in done for a in r.chain for e in a.energy.values() for c in e})
    return {
        n: mean_reading(
            pricing.add(e[n] for a in r.chain for e in a.energy.values() if n in e) for r in done
        )
        for n in names
    }


def _spent(arm: Arm, grid: Intensity | None) -> Spent:
    """Every joule of the arm, as sums: nothing that was burnt is left out, finished or not, shown
    or older."""
    shown = [a for r in arm.runs for a in r.attempts]
    older = [a for r in arm.older for a in r.attempts]
    # earlier repetitions, and what broke off after the last result
    repeated = [a for r in arm.runs if r.done for a in r.attempts if a not in r.chain]
    return Spent(
        energy_j=sum_reading(a.total_energy_j for a in shown + older),
        carbon_g=sum_reading(a.grams(a.total_energy_j, grid) for a in shown + older),
        unfinished_energy_j=sum_reading(a.total_energy_j for a in shown if a.status != "done"),
        repeated_energy_j=sum_reading(a.total_energy_j for a in repeated),
        older_inputs_energy_j=sum_reading(a.total_energy_j for a in older),
        attempts=len(shown) + len(older),
    )


def _inference(arm: Arm) -> Estimate:
    """Joules per image, over seeds."""
    readings = {s: j for s, run in arm.finished.items() if (j := run.inference_energy_j)}
    out = mean_reading(
        readings.values(),
        {s: r.value for s, r in sorted(readings.items())},
        "not measured: no fact `inference_energy_j` and no samples in a `measure` phase",
    )
    spreads = [run.facts.inference_spread for run in arm.finished.values()]
    known = [s for s in spreads if s is not None]
    return out.model_copy(update={"spread": max(known)}) if known else out


# what is compared with the baseline beside the metric and the readings that have their own values
# by seed
COMPARED: dict[str, Callable[[Arm], dict[int, float]]] = {
    "total_energy": lambda arm: per_seed(arm, lambda s: arm.done[s].total_energy_j.value),
    "train_flops": _train_flops,
    "wall": _wall,
    "latency_p50": _latency_p50,
    **{k: _fact(k) for k in PLAIN},
}
# figures a busy machine disturbs: their spread over seeds says how much
TIMED = {
    "wall_s": "wall",
    "latency_p50_ms": "latency_p50",
    "images_per_s": "images_per_s",
    "peak_memory_mb": "peak_memory_mb",
}
