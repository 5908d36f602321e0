"""Training in stages: one model learns with one set of techniques after another, in one run
(`stages:` of an arm)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core import distributed, weights
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment.jobs import BOUNDARY, CHECKPOINT_FILE, located
from greenvis.experiment.loop import Progress
from greenvis.experiment.prepare import Prepared
from greenvis.meters.track import Tracker


def check(prepared: Prepared, model: nn.Module) -> None:
    """Wrap and merge `model` stage by stage, untrained. Raises BadInput with file:line for a stage
    that cannot be."""
    job = prepared.job
    for number, stage in enumerate(prepared.stages):
        where = job.recipe.where("arms", job.arm.name, "stages", number)
        live = located(where, wrap, model, stage.techniques(trained=False), task=stage.task)
        if number + 1 < len(job.arm.stages):
            stuck = [
                f"{t.name}: {i.unmergeable}"
                for t, i in zip(live.techniques, live.installed, strict=True)
                if i.unmergeable
            ]
            if stuck:
                raise BadInput(
                    f"{where}: only the last stage may hold what cannot be merged into the model "
                    f"({'; '.join(stuck)})"
                )
            live.merge()
        else:
            live.undo()


def train(
    prepared: Prepared, model: nn.Module, fit: Callable[..., Progress], run: Tracker
) -> tuple[Wrapped, Progress, dict[str, Tensor]]:
    """Train `model` stage by stage and return the last stage's wrap, how it ended, and what all
    stages changed or added.

    Each stage is merged into the model before the next begins, and has an optimizer and a schedule
    of its own; its epochs are metered below "train/NAME". fit(prepared, live, run, checkpoint,
    phase=, done=): trains one. A run that was cut short goes on in the stage it had come to.
    """
    job, stages = prepared.job, prepared.stages
    started = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    file = job.folder / f"{job.inputs}-{BOUNDARY}"
    rows: list[dict[str, Any]] = _resume(model, file)
    if rows:
        run.note(f"resumed after stage '{rows[-1]['stage']}'")
    while True:
        number = len(rows)
        stage = stages[number]
        torch.manual_seed(job.seed + number)
        with run.phase("setup"):
            live = wrap(model, stage.techniques(), task=stage.task)
        run.live = live
        live.meter(run)
        learning = sum(p.numel() for p in live.trainable.values())
        done = sum(row["epochs"] for row in rows)
        checkpoint = job.folder / f"{job.inputs}-{number + 1}-{CHECKPOINT_FILE}"
        name = stage.job.arm.stage
        progress = fit(stage, live, run, checkpoint, phase=f"train/{name}", done=done)
        row = {
            "stage": name,
            "epochs": progress.epoch,
            "accuracy": progress.accuracy,
            "trainable_params": learning,
        }
        rows.append(row)
        run.log(**row)
        used = [{t.name: t.recipe_form()} for s in stages for t in s.job.arm.techniques]
        run.fact(stages=rows, techniques=used, **live.facts())
        if len(rows) == len(stages):
            break
        live.merge()
        distributed.on_main(
            lambda: weights.write(file, weights.full_state_dict(model), {"rows": rows})
        )
        checkpoint.unlink(missing_ok=True)
    now = live.model.state_dict()
    changed = {
        n: t
        for n, t in now.items()
        if n not in started or not torch.equal(t.detach().cpu(), started[n])
    }
    # the most that learn at once
    run.fact(trainable_params=max(row["trainable_params"] for row in rows))
    return live, dataclasses.replace(progress, epoch=sum(row["epochs"] for row in rows)), changed


def _resume(model: nn.Module, file: Path) -> list[dict[str, Any]]:
    """Give the model what the stages that are over left, and return what is known of them."""
    if not file.exists():
        return []
    try:
        rows = weights.metadata(file)["rows"]
        weights.load_state(model, weights.read_state(file))
    except (BadInput, KeyError, RuntimeError) as error:
        raise GreenvisError(
            f"{file} cannot be read ({error}); remove it to start this arm again"
        ) from error
    return rows
