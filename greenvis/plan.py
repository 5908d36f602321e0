"""What a recipe will cost, before it is spent: a few real steps of each arm, extrapolated, with a band."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from greenvis import data, price, ranks, record, stages, subset, train
from greenvis.experiment import Session
from greenvis.jobs import PLAN_FILE, Job
from greenvis.recipe import Recipe, load_recipe
from greenvis.wrap import wrap

GROUPS = 3  # groups of steps whose spread gives the band, after one to warm up
GROUP_S = 0.5  # seconds a group should last
EVAL_BATCHES = 2
ITERATIONS, MAKING_BAND = 5, 0.3  # of making a subset: how many are tried, and how far off that may be
BUSY_BAND = 0.3  # of energy and time: busy neighbours alone moved the same work by a quarter here
COUNT_BAND = 0.02  # of FLOPs: the last, shorter batches of an epoch


def plan(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a few steps of each arm and return what training and evaluation of all arms and seeds will cost.

    {"arms": {ARM: {"runs", "energy_j", "carbon_g", "wall_s", "flops"}}, "total": {…}}, figures as {"value", "low", "high"}
    for all seeds of an arm; an arm this recipe builds on is listed by its name. Kept beside the records, so that the
    report can set it against what was spent. Raises BadInput, GreenvisError.
    """
    ranks.alone("greenvis plan")
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    session = Session(Path(runs), trust, (), say)
    jobs = session.plan(recipe)
    arms: dict[str, dict[str, Any]] = {}
    for job in jobs:
        if job.name not in arms:
            say(f"{job.name}: a few steps")
            with train.threads(job.arm.train.threads):
                each = [_predict(session, its) for its in stages.of(job) or [job]]
                each += [_making(session, job)] if job.arm.subset else []
            arms[job.name] = {"inputs": job.inputs, "each": _summed(each)}
    for name, arm in arms.items():
        arm["runs"] = sum(job.name == name for job in jobs)
        arm |= {key: _scaled(figure, arm["runs"]) for key, figure in arm["each"].items()}
    keys = ("energy_j", "carbon_g", "wall_s", "flops")
    total = {key: {b: math.fsum(a[key][b] for a in arms.values()) for b in ("value", "low", "high")} for key in keys}
    found = {"arms": arms, "total": total}
    path = Path(runs) / recipe.name / PLAN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=2))
    os.replace(part, path)
    return found


def _predict(session: Session, job: Job) -> dict[str, dict[str, float]]:
    """Train groups of steps on a model that is thrown away, long enough to be told from their start, and scale them up."""
    spec, images = job.arm.train, session.jobs.images(job.recipe)
    batches, tests = math.ceil(len(_shown(session, job)) / spec.batch_size), max(spec.batch_size, 256)
    first = min(2 * spec.accumulate, batches)
    step_s = (_few(session, job, first, 2, tests).sum("wall_s", "train/epoch2") or 0.0) / first
    steps = min(max(math.ceil(GROUP_S / max(step_s, 1e-6)), first), batches)
    seen = _few(session, job, steps, GROUPS + 1, tests)
    evaluations = math.ceil(spec.epochs / spec.eval_every) if spec.eval_every else 1
    shown = min(EVAL_BATCHES * tests, len(images.test)) * (GROUPS + 1)
    its = session.stream(job)
    if its is None:
        return _whole(seen, spec.epochs * batches / steps, evaluations * len(images.test) / shown)
    trained = sum(math.ceil(len(part) / spec.batch_size) for part in its.train)
    tested = len(its.tasks) * sum(len(part) for _, part in its.tests)  # all of them after each task
    return _whole(seen, spec.epochs * trained / steps, tested / shown)


def _shown(session: Session, job: Job) -> data.ImageSet:
    """Return as many images as the job trains on, and like them."""
    images, spec = session.jobs.images(job.recipe).train, job.arm.subset
    return images if spec is None else subset.make(images, method="random", per_class=spec.per_class)


def _making(session: Session, job: Job) -> dict[str, dict[str, float]]:
    """Choose or make the arm's subset, in fewer iterations, and scale them up."""
    assert job.arm.subset is not None
    images, spec = session.jobs.images(job.recipe).train, job.arm.subset.model_dump()
    few = min(ITERATIONS, spec["iterations"]) if spec["method"] == "condensed" else spec["iterations"]
    with tempfile.TemporaryDirectory() as folder:
        with session.tracker(job, Path(folder), codecarbon=False) as run:
            for phase in ("warm-up", "subset"):
                with run.phase(phase):
                    subset.make(images, seed=job.seed, count=run.flops, **{**spec, "iterations": few})
        seen = record.read(next(record.find([folder])))
    factor = spec["iterations"] / few
    joules = price.run_energy(seen, "subset").value or 0.0
    grams = price.carbon(record.Reading("energy_j", joules), seen.header["carbon_intensity"], seen.header.get("pue", 1.0))
    counted = {quantity: seen.sum(quantity, "subset") or 0.0 for quantity in ("wall_s", "flops")}
    found = {"energy_j": joules, "carbon_g": grams.value or 0.0, **counted}
    band = {"low": 1 - MAKING_BAND, "value": 1.0, "high": 1 + MAKING_BAND}
    return {key: {b: factor * value * (1.0 if key == "flops" else f) for b, f in band.items()} for key, value in found.items()}


def _few(session: Session, job: Job, steps: int, groups: int, tests: int) -> record.Run:
    """Train `groups` epochs of `steps` batches, each with a short evaluation, and return the record."""
    images = session.jobs.images(job.recipe)
    spec = job.arm.train.model_copy(update={"epochs": groups, "target_accuracy": None, "eval_every": 1})

    def some(epoch: int, start: int) -> list[Any]:
        loader = data.batches(_shown(session, job), spec.batch_size, epoch=epoch, seed=job.seed, shuffle=True)
        return list(islice(loader, steps))

    def test() -> list[Any]:
        return list(islice(data.batches(images.test, tests), EVAL_BATCHES))

    with tempfile.TemporaryDirectory() as folder:
        live = wrap(session.build(job, weights=False), session.techniques(job, trained=False))
        with session.tracker(job, Path(folder), codecarbon=False) as run:
            run.live = live
            live.meter(run)
            train.fit(live, some, steps, test, spec, run, seed=job.seed)
        live.undo()
        return record.read(next(record.find([folder])))


def _whole(seen: record.Run, train_factor: float, eval_factor: float) -> dict[str, dict[str, float]]:
    groups = [f"train/epoch{g + 2}" for g in range(GROUPS)]

    def energy(phase: str) -> float:
        return price.run_energy(seen, phase).value or 0.0

    def figure(of: Callable[[str], float], band: float = BUSY_BAND) -> dict[str, float]:
        each = [of(phase) for phase in groups]
        fixed = eval_factor * of("eval")
        middle = train_factor * math.fsum(each) / len(each) + fixed
        low, high = (train_factor * bound(each) + fixed for bound in (min, max))
        return {"value": middle, "low": min(low, middle * (1 - band)), "high": max(high, middle * (1 + band))}

    joules = figure(energy)
    grams = price.carbon(record.Reading("energy_j", 1.0), seen.header["carbon_intensity"], seen.header.get("pue", 1.0))
    return {
        "energy_j": joules,
        "carbon_g": _scaled(joules, grams.value or 0.0),
        "wall_s": figure(lambda phase: seen.sum("wall_s", phase) or 0.0),
        "flops": figure(lambda phase: seen.sum("flops", phase) or 0.0, COUNT_BAND),
    }


def _summed(parts: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the figures of all stages of a run together."""
    return {key: {bound: math.fsum(part[key][bound] for part in parts) for bound in figure} for key, figure in parts[0].items()}


def _scaled(figure: dict[str, float], factor: float) -> dict[str, float]:
    return {bound: value * factor for bound, value in figure.items()}
