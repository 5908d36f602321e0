"""One arm's numbers out of its seed runs: means over seeds, every joule kept, what is missing
said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from greenvis.meters import carbon, pricing
from greenvis.meters.record import PROVENANCES, Reading
from greenvis.report import cached_outputs, continual, stats
from greenvis.report.groups import APART, Attempt, SeedRun
from greenvis.report.teachers import teachers

PLAIN = ("macs", "params", "trainable_params", "delta_bytes", "images_per_s", "peak_memory_mb")
LOWER_IS_BETTER = ("loss", "error", "forgetting", "perplexity", "mae", "mse", "rmse")

Intensity = Mapping[str, Any]


@dataclass
class Arm:
    """The seed runs shown for one arm, and those of older inputs, which only keep their energy in
    the totals."""

    label: str
    runs: list[SeedRun]
    older: list[SeedRun] = field(default_factory=list)

    @property
    def done(self) -> dict[int, SeedRun]:
        """Seed runs that finished, by seed."""
        return {r.seed: r for r in self.runs if r.done}

    @property
    def all(self) -> list[SeedRun]:
        """Every seed run, older inputs included."""
        return [*self.runs, *self.older]


def per_seed(arm: Arm, value: Callable[[SeedRun], float | None]) -> dict[int, float]:
    """Return a number by finished seed, leaving out seeds where it is missing or not finite."""
    values = {seed: value(run) for seed, run in arm.done.items()}
    return {
        s: float(v) for s, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)
    }


def score(run: SeedRun, metric: str) -> float | None:
    """Return the metric of a finished run: its fact, else the last value it logged."""
    done = run.done
    value = done.facts.get(metric) if done else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return done.curve[-1][1] if done and done.curve else None


def grams(run: SeedRun, grid: Intensity | None, *, apart: bool = True) -> Reading:
    """Return the CO2e of the attempts that led to a result, each priced with its own grid, or all
    with `grid`."""
    return pricing.add(
        (
            attempt_grams(a, a.total_energy_j if apart else a.training_energy_j, grid)
            for a in run.chain
        ),
        "carbon_g",
    )


def attempt_grams(attempt: Attempt, joules: Reading, grid: Intensity | None) -> Reading:
    """Return the CO2e of some of an attempt's joules."""
    return carbon.grams(
        joules, grid or attempt.header.get("carbon_intensity") or {}, pue_of(attempt)
    )


def pue_of(attempt: Attempt) -> float:
    """Return the power usage effectiveness a record was made with; 1 where it says none."""
    pue = attempt.header.get("pue")
    return float(pue) if isinstance(pue, (int, float)) else 1.0


def mean_reading(readings: Iterable[Reading]) -> dict[str, Any]:
    """Return {"value", "low", "high", "provenance", "method", "std", "n"}, the mean over seeds
    bound by bound."""
    items = list(readings)
    known = [r for r in items if r.value is not None]
    if not known:
        reasons = sorted({r.reason for r in items if r.reason})
        return {
            "value": None,
            "low": None,
            "high": None,
            "provenance": None,
            "reason": "; ".join(reasons) or "no finished run",
        }
    n, total = len(known), pricing.add(known)
    s = stats.summary({i: r.value for i, r in enumerate(known) if r.value is not None})
    out = {
        "value": s["mean"],
        "low": (total.low or 0) / n,
        "high": (total.high or 0) / n,
        "provenance": total.provenance,
    }
    return {
        **out,
        "method": total.method,
        "std": s["std"],
        "n": n,
        **({"reason": total.reason} if total.reason else {}),
    }


def sum_reading(readings: Iterable[Reading]) -> dict[str, Any]:
    """Return {"value", "low", "high", "provenance"} of a sum; 0 for nothing at all."""
    items = list(readings)
    if not items:
        return {"value": 0.0, "low": 0.0, "high": 0.0, "provenance": None}
    r = pricing.add(items)
    return {
        "value": r.value,
        "low": r.low,
        "high": r.high,
        "provenance": None if r.value is None else r.provenance,
    }


def numbers(arm: Arm, metric: str, grid: Intensity | None) -> dict[str, Any]:
    """Return what the results say of one arm by itself (ratios to the baseline, and what it reuses,
    are added later)."""
    done = list(arm.done.values())
    scores = per_seed(arm, lambda r: score(r, metric))
    out: dict[str, Any] = {
        metric: {**stats.summary(scores), "by_seed": text_keys(scores)},
        "status": "done"
        if len(done) == len(arm.runs)
        else ("partly done" if done else "incomplete"),
        "seeds": sorted(arm.done),
        "attempts": dict(sorted(Counter(a.status for r in arm.runs for a in r.attempts).items())),
        "train_energy_j": mean_reading([r.training_energy_j for r in done])
        | {"by_seed": text_keys(per_seed(arm, lambda r: r.training_energy_j.value))},
        "total_energy_j": mean_reading([r.total_energy_j for r in done]),
        "carbon_g": mean_reading([grams(r, grid, apart=False) for r in done]),
        "total_carbon_g": mean_reading([grams(r, grid) for r in done]),
        "energy_by_phase_j": _by_stage(done),
        "energy_by_component_j": _by_component(done),
        "spent": _spent(arm, grid),
        "inference_energy_j": inference(done),
        "embodied_g": stats.summary(per_seed(arm, embodied))["mean"],
        "latency_ms": latency(done),
        "wall_s": stats.summary(per_seed(arm, wall))["mean"],
        "train_flops": stats.summary(per_seed(arm, train_flops))["mean"],
        **{k: stats.summary(per_seed(arm, fact(k)))["mean"] for k in PLAIN},
        "std": {k: stats.summary(per_seed(arm, of))["std"] for k, of in TIMED.items()},
        "by_seed": {k: text_keys(per_seed(arm, of)) for k, of in COMPARED.items()},
    }
    grids = [grid or a.header.get("carbon_intensity") or {} for r in done for a in r.chain]
    out["zones"] = sorted({str(g.get("zone")) for g in grids if g.get("zone")})
    out["assumed_grid"] = any(g.get("assumed") for g in grids)
    return {**out, **_extras(arm, done)}


def text_keys(values: Mapping[int, float]) -> dict[str, float]:
    """Return figures by seed with keys as JSON has them."""
    return {str(s): v for s, v in values.items()}


def fact(key: str) -> Callable[[SeedRun], float | None]:
    """Return a reader of one fact of a finished run."""
    return lambda run: run.done.facts.get(key) if run.done else None


def wall(run: SeedRun) -> float | None:
    """Seconds of the attempts that led to a result, measurement left out."""
    seconds = [
        t["wall_s"]
        for a in run.chain
        for s, t in a.totals.items()
        if s not in APART and "wall_s" in t
    ]
    return math.fsum(seconds) if seconds else None


def train_flops(run: SeedRun) -> float | None:
    """FLOPs counted while training (all attempts, a teacher's included), else the fact of that
    name."""
    counts = [
        t["flops"]
        for a in run.chain
        for s, t in a.totals.items()
        if s in ("train", "teacher") and t.get("flops")
    ]
    return math.fsum(counts) if counts else fact("train_flops")(run)


def latency_p50(run: SeedRun) -> float | None:
    """Median milliseconds of one call, as measured after the training."""
    return (latency([run]) or {}).get("p50")


def embodied_g(attempt: Attempt, seconds: float) -> float | None:
    """Return the grams of CO2e of making the machine that fall on that time of use; None where they
    were not given."""
    try:
        return carbon.embodied_grams(attempt.header.get("embodied"), seconds).value
    except (TypeError, KeyError, ZeroDivisionError):  # a header of other hands
        return None


def embodied(run: SeedRun) -> float | None:
    """Return the grams of CO2e of making the machine that fall on the time a result took."""
    walls = [
        (a, t["wall_s"])
        for a in run.chain
        for s, t in a.totals.items()
        if s not in APART and "wall_s" in t
    ]
    by_attempt = [embodied_g(a, s) for a, s in walls]
    known = [g for g in by_attempt if g is not None]
    return math.fsum(known) if known and len(known) == len(by_attempt) else None


def _by_stage(done: list[SeedRun]) -> dict[str, Any]:
    """Mean joules by stage over seeds; a seed without the stage counts 0 there, so the stages add
    up to the total."""
    names = sorted({s for r in done for a in r.chain for s in a.energy})
    out = {}
    for name in names:
        sums = [
            pricing.add(x for a in r.chain for x in a.energy.get(name, {}).values()).value or 0.0
            for r in done
        ]
        out[name] = math.fsum(sums) / len(sums)
    return out


def _by_component(done: list[SeedRun]) -> dict[str, Any]:
    names = sorted({c for r in done for a in r.chain for e in a.energy.values() for c in e})
    return {
        n: mean_reading(
            [pricing.add(e[n] for a in r.chain for e in a.energy.values() if n in e) for r in done]
        )
        for n in names
    }


def _spent(arm: Arm, grid: Intensity | None) -> dict[str, Any]:
    """Every joule of the arm, as sums: nothing that was burnt is left out, finished or not, shown
    or older."""
    shown = [a for r in arm.runs for a in r.attempts]
    older = [a for r in arm.older for a in r.attempts]
    return {
        "energy_j": sum_reading(a.total_energy_j for a in shown + older),
        "carbon_g": sum_reading(attempt_grams(a, a.total_energy_j, grid) for a in shown + older),
        "unfinished_energy_j": sum_reading(a.total_energy_j for a in shown if a.status != "done"),
        "repeated_energy_j": sum_reading(a.total_energy_j for a in repeats(arm)),
        "older_inputs_energy_j": sum_reading(a.total_energy_j for a in older),
        "attempts": len(shown) + len(older),
    }


def repeats(arm: Arm) -> list[Attempt]:
    """Return the starts that belong to no shown result: earlier repetitions, and what broke off
    after the last result."""
    return [a for r in arm.runs if r.done for a in r.attempts if a not in r.chain]


def inference(done: list[SeedRun]) -> dict[str, Any]:
    """Joules an image: the fact `inference_energy_j`, else what the timed inference of the measure
    phase took."""
    by_seed: dict[int, Reading] = {}
    for run in done:
        fact = run.done.facts.get("inference_energy_j") if run.done else None
        fact = {"value": fact} if isinstance(fact, (int, float)) else fact
        if isinstance(fact, Mapping) and isinstance(fact.get("value"), (int, float)):
            v, p = fact["value"], fact.get("provenance")
            by_seed[run.seed] = Reading(
                "inference_energy_j", v, fact.get("low", v), fact.get("high", v),
                str(fact.get("method") or "fact"),
                p if p in PROVENANCES else "estimated",
            )  # fmt: skip
        elif run.done and run.done.inference_j and run.done.inference_j.value is not None:
            by_seed[run.seed] = run.done.inference_j
    facts = [run.done.facts.get("inference_energy_j") for run in done if run.done]
    spreads = [
        s
        for f in facts
        if isinstance(f, Mapping)
        and isinstance(s := f.get("spread"), (int, float))
        and 0 <= s < 1e3
    ]
    out = mean_reading(by_seed.values()) | {
        "by_seed": {str(s): r.value for s, r in sorted(by_seed.items())}
    }
    out |= {"spread": max(spreads)} if spreads else {}
    if out["value"] is None:
        out["reason"] = (
            "not measured: no fact `inference_energy_j` and no samples in a `measure` phase"
        )
    return out


def latency(done: list[SeedRun]) -> dict[str, float] | None:
    """Return the seeds' mean latency in milliseconds by quantile, None where none was measured."""
    latencies = [r.done.facts.get("latency_ms") for r in done if r.done]
    latencies = [{"p50": f} if isinstance(f, (int, float)) else f for f in latencies]
    keys = sorted(
        {
            k
            for f in latencies
            if isinstance(f, Mapping)
            for k, v in f.items()
            if isinstance(v, (int, float))
        }
    )
    means = {
        k: stats.summary(
            {i: f[k] for i, f in enumerate(latencies) if isinstance(f, Mapping) and k in f}
        )["mean"]
        for k in keys
    }
    return means or None


def _extras(arm: Arm, done: list[SeedRun]) -> dict[str, Any]:
    """Facts shown where they exist: the task matrix, techniques."""
    out: dict[str, Any] = {}
    last = [r.done.facts for r in done if r.done]
    matrices = [f["task_accuracy"] for f in last if _matrix(f.get("task_accuracy"))]
    if matrices:
        out["continual"] = continual.summary(
            {
                s: r.done.facts
                for s, r in arm.done.items()
                if r.done and _matrix(r.done.facts.get("task_accuracy"))
            },
            per_seed(arm, lambda r: r.training_energy_j.value),
        )
        tasks = len(matrices[0])
        same = [m for m in matrices if len(m) == tasks]
        out["task_accuracy"] = [
            [
                math.fsum(m[t][i] for m in same) / len(same)
                if all(_number(m[t], i) for m in same)
                else None
                for i in range(tasks)
            ]
            for t in range(tasks)
        ]
    if last and last[-1].get("techniques"):
        out["techniques"] = last[-1]["techniques"]
    if outputs := cached_outputs.rows(last):
        out["kept"] = outputs
    if several := teachers(last):
        out["teachers"] = several
    return out


# figures a busy machine disturbs: their spread over seeds says how much
TIMED: dict[str, Callable[[SeedRun], float | None]] = {
    "wall_s": wall, "latency_p50_ms": latency_p50, "images_per_s": fact("images_per_s"),
    "peak_memory_mb": fact("peak_memory_mb"),
}  # fmt: skip
# what is compared with the baseline beside the metric and the readings that have their own values
# by seed
COMPARED: dict[str, Callable[[SeedRun], float | None]] = {
    "total_energy": lambda r: r.total_energy_j.value, "train_flops": train_flops, "wall": wall,
    "latency_p50": latency_p50,
    **{k: fact(k) for k in PLAIN},
}  # fmt: skip


def _matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) for row in value)


def _number(row: list[Any], i: int) -> bool:
    return i < len(row) and isinstance(row[i], (int, float))
