"""Training in stages: one model learns with one set of techniques after another, in one run
(`stages:` of an arm)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core import distributed, weights
from greenvis.core.attached import full_state_dict
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment.jobs import located
from greenvis.experiment.parts import check_feeds, feeds_of
from greenvis.experiment.prepare import Prepared
from greenvis.experiment.step import check_again
from greenvis.meters.track import Tracker


def check(prepared: Prepared, model: nn.Module) -> None:
    """Wrap and merge `model` stage by stage, untrained. Raises BadInput with file:line for a stage
    that cannot be."""
    job = prepared.job
    for number, stage in enumerate(prepared.stages):
        where = job.recipe.where("arms", job.arm.name, "stages", number)
        if stage.job.arm.on and stage.images.unlabeled is None:
            raise BadInput(
                f"{where}: it trains on the images without a label, and there are none: set "
                "data.unlabeled"
            )
        live = located(where, wrap, model, stage.techniques(trained=False), task=stage.task)
        if stage.job.arm.on and not live.pretext:
            raise BadInput(
                f"{where}: on: {stage.job.arm.on} is for a pretext (simclr, mae, …): nothing else "
                "learns without labels"
            )
        located(where, check_again, live, stage.job.arm.train)
        located(where, check_feeds, live, feeds_of(stage.images))
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


class Stages:
    """What the stages of a training leave, one after another: rows of the record, and the weights
    that each is merged into before the next begins.

    Args:
        model: As the first stage begins with it.
        file: What stages that are over left, and where they leave it; None: nowhere.
        tracker: Of the training.

    Attributes:
        rows: Of the stages that are over.
    """

    def __init__(self, model: nn.Module, file: Path | None, tracker: Tracker) -> None:
        self.model, self.file, self.run = model, file, tracker
        self.began = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
        self.rows: list[dict[str, Any]] = [] if file is None else _resume(model, file)
        if self.rows:
            tracker.note(f"resumed after stage '{self.rows[-1]['stage']}'")

    @property
    def epochs(self) -> int:
        """Trained so far."""
        return sum(row["epochs"] for row in self.rows)

    def end(
        self, name: str, live: Wrapped, epochs: int, metrics: Mapping[str, float], last: bool
    ) -> None:
        """Note how a stage ended; merge it into the model unless it is the last."""
        learning = sum(p.numel() for p in live.trainable.values())
        row = {"stage": name, "epochs": epochs, **metrics, "trainable_params": learning}
        self.rows.append(row)
        self.run.log(**row)
        # the most that learn at once
        most = max(row["trainable_params"] for row in self.rows)
        self.run.fact(stages=self.rows, trainable_params=most, **live.facts())
        if last:
            return
        live.merge()
        if self.file is not None:
            distributed.on_main(self._write)

    def _write(self) -> None:
        assert self.file is not None
        weights.write(self.file, full_state_dict(self.model), {"rows": self.rows})

    def delta(self) -> dict[str, Tensor]:
        """Return what all stages changed or added, by name."""
        return {
            name: value
            for name, value in self.model.state_dict().items()
            if name not in self.began or not torch.equal(value.detach().cpu(), self.began[name])
        }


def _resume(model: nn.Module, file: Path) -> list[dict[str, Any]]:
    """Give the model what the stages that are over left, and return their rows."""
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
