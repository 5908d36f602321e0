"""What a recipe will cost, before it is spent: a few real steps of each arm, extrapolated, with a
band."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from greenvis import data
from greenvis.core import distributed, weights
from greenvis.data import subsets
from greenvis.data.image_set import Concat
from greenvis.experiment import checkpoint, loop, synthesis
from greenvis.experiment.jobs import Job, predicted
from greenvis.experiment.optim import threads
from greenvis.experiment.prepare import Prepared, Short
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.run_folder import PLAN_FILE, SUBSET_FILE, SYNTHESIS_FILE, write_json
from greenvis.experiment.session import Session
from greenvis.meters import carbon, pricing, record
from greenvis.meters.track import track

GROUPS = 3  # groups of steps whose spread gives the band, after one to warm up
GROUP_S = 0.5  # seconds a group should last
EVAL_BATCHES = 2
# of making a subset: how many are tried, and how far off that may be
ITERATIONS, EPOCHS, MAKING_BAND = (5, 2, 0.3)
BUSY_BAND = 0.3  # of energy and time: busy neighbours alone moved the same work by a quarter here
BOUNDS, FIGURES = ("value", "low", "high"), ("energy_j", "carbon_g", "wall_s", "flops")
NOTHING = dict.fromkeys(BOUNDS, 0.0)
COUNT_BAND = 0.02  # of FLOPs: the last, shorter batches of an epoch


def plan(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a few steps of each arm and return what training and evaluation of all arms and seeds
    will cost.

    One whole run's observations (CPU-seconds, GB-seconds, …) are written beside the records, so
    that the report can set them against what was spent.

    Args:
        recipe: a recipe, or its file.
        overrides: of the recipe ("train.epochs=3").
        runs: folder of run records.
        trust: allow models given as package.module:function, which runs their code.
        say: told how the work goes on.

    Returns:
        {"arms": {ARM: {"runs", "done", "energy_j", "carbon_g", "wall_s", "flops"}}, "total": {…},
        "planning": {"energy_j", "wall_s"}}, figures as {"value", "low", "high"} of what is still
        to do: finished runs of these inputs cost nothing more, one that broke off what it has
        left. An arm this recipe builds on is listed by its name. "planning": what the prediction
        itself took.

    Raises:
        BadInput: where the recipe cannot be used.
        GreenvisError: where an arm's steps fail.
    """
    distributed.require_single_process("greenvis plan")
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    with tempfile.TemporaryDirectory() as folder, track("plan", dir=folder, quiet=True) as own:
        arms = _arms(recipe, Session(Path(runs), trust, (), say), say)
        took = {"energy_j": pricing.reading(own.energy()), "wall_s": own.observed()["wall_s"]}
    prediction = {"arms": arms, "total": total(arms), "planning": took}
    path = Path(runs) / recipe.name / PLAN_FILE
    write_json(path, prediction)
    return prediction


def _arms(
    recipe: Recipe, session: Session, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Return what each arm will cost."""
    by_arm: dict[str, list[Job]] = {}
    for job in session.plan(recipe):
        by_arm.setdefault(job.name, []).append(job)
    arms: dict[str, dict[str, Any]] = {}
    for name, jobs in by_arm.items():
        job, ahead = jobs[0], [job for job in jobs if job.done() is None]
        arms[name] = {
            "inputs": job.inputs,
            "runs": len(ahead),
            "done": len(jobs) - len(ahead),
            **dict.fromkeys(FIGURES, NOTHING),
        }
        if not ahead:
            arms[name]["each"] = predicted(job)  # what an earlier plan said, if one was made
            continue
        say(f"{name}: a few steps")
        with threads(job.arm.train.threads):
            prepared = session.prepare(job)
            parts = [_predict(part) for part in prepared.stages or [prepared]]
            making = _making(prepared) if job.arm.subset else _synthesis(prepared)
        arms[name]["each"] = _summed(
            [figures for figures, _ in [*parts, *([making] if making else [])]]
        )
        left = [
            _scaled(parts[i][0], share)
            for job in ahead
            for i, share in enumerate(_shares_left(session.prepare(job)))
        ]
        if making:
            left += [
                making[0]
                for job in ahead
                if not any(
                    (job.folder / f"{job.inputs}-{name}").exists()
                    for name in (SUBSET_FILE, SYNTHESIS_FILE)
                )
            ]
        arms[name] |= _priced(_summed(left), parts[0][1])
    return arms


def expected(prepared: Prepared) -> float | None:
    """Return the joules that a job's whole training is expected to take, from a few of its steps;
    None where no energy is known here."""
    parts = [_predict(part) for part in prepared.stages or [prepared]]
    return _priced(_summed([figures for figures, _ in parts]), parts[0][1])["energy_j"]["value"]


def total(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what arms cost together."""
    return {
        key: {b: math.fsum(arm[key][b] for arm in arms.values()) for b in BOUNDS} for key in FIGURES
    }


def _shares_left(prepared: Prepared) -> list[float]:
    """Return the share of its training that a job has still to do, by stage (one for a job
    without), as its checkpoint says."""
    each, boundary, file = prepared.stages, prepared.boundary, prepared.checkpoint
    over = 0
    if each and boundary is not None and boundary.exists():
        over = len(weights.metadata(boundary)["rows"])
    left = [0.0] * over + [1.0] * (len(each or [prepared]) - over)
    if file is None or not file.exists() or over == len(left):
        return left
    spec = (each or [prepared])[over].job.arm.train
    stream, at = prepared.stream, checkpoint.read(file)["progress"]
    active = prepared.job.arm.active
    sizes = [len(p) for p in stream.train] if stream else [len(_like_trained(prepared))]
    sizes = active.counts() if active else sizes
    number = at["part"] - over
    shown = sum(sizes[: max(number, 0)]) * spec.epochs
    if 0 <= number < len(sizes):
        shown += at["epoch"] * sizes[number] + at["batch"] * spec.batch_size
    left[over] = 0.0 if at["reached"] else max(0.0, 1 - shown / max(sum(sizes) * spec.epochs, 1))
    return left


Figures = dict[str, dict[str, float]]  # by quantity: {"value", "low", "high"}


def _predict(prepared: Prepared) -> tuple[Figures, dict[str, Any]]:
    """Train groups of steps on a model that is thrown away, long enough to be told from their
    start, and scale them up.

    Returns what the whole training observes, by quantity, and the header of the few steps' record,
    which prices it.
    """
    spec, images, stream = prepared.job.arm.train, prepared.images, prepared.stream
    batches = math.ceil(len(_like_trained(prepared)) / spec.batch_size)
    tests = max(spec.batch_size, 256)
    first = min(2 * spec.accumulate, batches)
    step_s = (_few(prepared, first, 2).sum("wall_s", "train/epoch2") or 0.0) / first
    steps = min(max(math.ceil(GROUP_S / max(step_s, 1e-6)), first), batches)
    measured = _few(prepared, steps, GROUPS + 1)
    evaluations = math.ceil(spec.epochs / spec.eval_every) if spec.eval_every else 1
    shown = min(EVAL_BATCHES * tests, len(images.test))
    if active := prepared.job.arm.active:
        trained = sum(math.ceil(n / spec.batch_size) for n in active.counts())
        # and each query looks at all that may be chosen
        queried = 0 if active.query == "random" else (active.rounds - 1) * len(images.train)
        tested = active.rounds * evaluations * len(images.test) + queried
        return _extrapolated(
            measured, spec.epochs * trained / steps, tested / shown
        ), measured.header
    if stream is None:
        epochs, tested = spec.epochs, evaluations * len(images.test)
        if search := prepared.job.arm.search:
            epochs += search.trials * search.epochs
            tested += search.trials * len(images.held_out or ())
        return _extrapolated(measured, epochs * batches / steps, tested / shown), measured.header
    trained = sum(math.ceil(len(part) / spec.batch_size) for part in stream.train)
    # all of them after each experience
    tested = len(stream.experiences) * sum(len(part) for _, part in stream.tests)
    return _extrapolated(measured, spec.epochs * trained / steps, tested / shown), measured.header


def _like_trained(prepared: Prepared) -> data.ImageSet:
    """Return as many images as the job trains on, and like them."""
    images, spec = prepared.images.train, prepared.job.arm.subset
    if prepared.job.arm.on and prepared.images.unlabeled is not None:
        return prepared.images.unlabeled
    if active := prepared.job.arm.active:
        return images.take(range(active.counts()[-1]))
    if making := prepared.job.arm.synthesis:
        more = sum(synthesis.planned(prepared, making).values())
        return Concat([images, images.take(torch.arange(more) % len(images))])
    return (
        images if spec is None else subsets.make(images, method="random", per_class=spec.per_class)
    )


def _making(prepared: Prepared) -> tuple[Figures, dict[str, Any]]:
    """Choose or make the arm's subset, in fewer iterations, and scale them up."""
    job = prepared.job
    assert job.arm.subset is not None
    images, spec = prepared.images.train, job.arm.subset.model_dump()
    few = (
        min(ITERATIONS, spec["iterations"]) if spec["method"] == "condensed" else spec["iterations"]
    )
    with tempfile.TemporaryDirectory() as folder:
        with prepared.tracker(Path(folder)) as run:
            for phase in ("warm-up", "subset"):
                with run.phase(phase):
                    subsets.make(
                        images, seed=job.seed, count=run.flops, **{**spec, "iterations": few}
                    )
        measured = record.read(next(record.find([folder])))
    return _made(measured, "subset", spec["iterations"] / few)


def _synthesis(prepared: Prepared) -> tuple[Figures, dict[str, Any]] | None:
    """Make the arm's images after fewer epochs, and scale them up; None where it makes none."""
    spec = prepared.job.arm.synthesis
    if spec is None or spec.by in ("oversample", "layout"):
        return None
    few = min(EPOCHS, spec.epochs)
    short = replace(prepared, short=Short())
    with tempfile.TemporaryDirectory() as folder:
        with prepared.tracker(Path(folder)) as run:
            synthesis.add(short, spec.model_copy(update={"epochs": few}), run)
        measured = record.read(next(record.find([folder])))
    return _made(measured, "synthesis", spec.epochs / few)


def _made(measured: record.Run, phase: str, factor: float) -> tuple[Figures, dict[str, Any]]:
    """Return what a phase observed, scaled up, and the header that prices it."""
    counted = {q: factor * (measured.sum(q, phase) or 0.0) for q in _quantities(measured)}
    bands = {quantity: 0.0 if quantity == "flops" else MAKING_BAND for quantity in counted}
    return {
        q: {"low": v * (1 - bands[q]), "value": v, "high": v * (1 + bands[q])}
        for q, v in counted.items()
    }, measured.header


def _few(prepared: Prepared, steps: int, groups: int) -> record.Run:
    """Train `groups` epochs of `steps` batches, with a short evaluation at the end, and return the
    record."""
    spec = prepared.job.arm.train.model_copy(
        update={"epochs": groups, "target": None, "eval_every": 0}
    )
    short = prepared.cut_short(
        Short(batches=steps, tests=EVAL_BATCHES),
        spec,
        _like_trained(prepared),
        prepared.images.test,
    )
    with tempfile.TemporaryDirectory() as folder:
        with short.tracker(Path(folder)) as run:
            outcome = loop.run(short, run)
        outcome.live.undo()
        return record.read(next(record.find([folder])))


def _extrapolated(measured: record.Run, train_factor: float, eval_factor: float) -> Figures:
    groups = [f"train/epoch{g + 2}" for g in range(GROUPS)]

    def figure(quantity: str) -> dict[str, float]:
        each = [measured.sum(quantity, phase) or 0.0 for phase in groups]
        fixed, band = (
            eval_factor * (measured.sum(quantity, "eval") or 0.0),
            COUNT_BAND if quantity == "flops" else BUSY_BAND,
        )
        middle = train_factor * math.fsum(each) / len(each) + fixed
        low, high = (train_factor * bound(each) + fixed for bound in (min, max))
        return {
            "value": middle,
            "low": min(low, middle * (1 - band)),
            "high": max(high, middle * (1 + band)),
        }

    return {quantity: figure(quantity) for quantity in _quantities(measured)}


def _quantities(measured: record.Run) -> list[str]:
    """Return what a prediction is made of: what the components are priced by, time and FLOPs."""
    priced = [str(c["observation"]) for c in measured.header["components"] if c.get("observation")]
    return list(dict.fromkeys([*priced, "wall_s", "flops"]))


def _priced(figures: Figures, header: Mapping[str, Any]) -> Figures:
    """Return `FIGURES` of what is observed: joules and grams by the header's coefficients and
    grid."""
    joules = pricing.forecast(figures, header["components"])
    grams = (
        carbon.grams(
            record.Reading("energy_j", 1.0), header["carbon_intensity"], header.get("pue", 1.0)
        ).value
        or 0.0
    )
    scaled = {bound: value * grams for bound, value in joules.items()}
    return {
        "energy_j": joules,
        "carbon_g": scaled,
        "wall_s": figures["wall_s"],
        "flops": figures["flops"],
    }


def _summed(parts: list[Figures]) -> Figures:
    """Return the figures of all parts together."""
    return {
        key: {bound: math.fsum(part[key][bound] for part in parts) for bound in BOUNDS}
        for key in parts[0]
    }


def _scaled(figures: Figures, factor: float) -> Figures:
    return {
        key: {bound: value * factor for bound, value in figure.items()}
        for key, figure in figures.items()
    }
