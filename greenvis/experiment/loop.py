"""The one training loop, on accelerate: metered, checkpointed, resumable to the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from greenvis import data
from greenvis.core import distributed
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import GreenvisError, some
from greenvis.experiment import checkpoint as states
from greenvis.experiment import loggers
from greenvis.experiment.evaluate import MATRIX, shared
from greenvis.experiment.optim import lr_factor, make_optimizer, new_accelerator
from greenvis.experiment.parts import Part, check_feeds, check_visits, check_wants
from greenvis.experiment.progress import Outcome, Progress
from greenvis.experiment.stages import Stages
from greenvis.experiment.step import Steady, Step, check_finite
from greenvis.meters.track import Tracker

CHECK_EVERY = 50  # steps between looks at the loss: a look waits for the device


class Prepared(Protocol):
    """What `run` trains: `experiment.prepare.Prepared`, or own parts on an own model.

    Attributes:
        seed: Of all that is drawn at random.
        checkpoint: A file to write as training goes, and to go on from if it is there; None: no
            such file. Removed by nobody here.
        boundary: The same for what stages that are over left.
    """

    @property
    def seed(self) -> int: ...
    @property
    def checkpoint(self) -> Path | None: ...
    @property
    def boundary(self) -> Path | None: ...

    def build(self) -> nn.Module:
        """Return the model, with the weights it begins with."""
        ...

    def parts(self, tracker: Tracker) -> list[Part]:
        """Return the parts, of which the first has techniques."""
        ...


def run(prepared: Prepared, tracker: Tracker, *, log_with: Sequence[str] = ()) -> Outcome:
    """Train what is prepared, part after part, and return how it ended.

    A part with techniques begins by wrapping the model with them; stages are merged into it first.
    A training cut short goes on to the same weights from its checkpoint.

    Args:
        prepared: What to train.
        tracker: Meters it; phases are "setup", "train/epoch1", "eval"; below "train/NAME" those of
            a stage, of a stream "train/task1/epoch1", "train/task1/end" and "eval/task1".
        log_with: accelerate's trackers (`loggers.LOGGERS`) that get metrics, loss and the joules so
            far, too, in the record's folder. Of several processes the first logs, without joules,
            which only a report adds up.

    Returns:
        The outcome.

    Raises:
        BadInput: For a tracker that is not installed.
        GreenvisError: When the loss is no longer finite.
    """
    with tracker.phase("setup"):
        model = prepared.build()
    parts = prepared.parts(tracker)
    stages = Stages(model, prepared.boundary, tracker) if parts[0].stage else None
    loop: Loop | None = None
    epochs = 0
    with ExitStack() as logging:
        for number in range(len(stages.rows) if stages else 0, len(parts)):
            part = parts[number]
            if part.techniques is not None:
                if stages:
                    torch.manual_seed(prepared.seed + number)
                with tracker.phase("setup"):
                    live = wrap(model, part.techniques(), task=part.task)
                tracker.live = live
                part.count(live)
                live.meter(tracker)
                tracker.fact(trainable_params=sum(p.numel() for p in live.trainable.values()))
                logging.close()
                done = stages.epochs if stages else 0
                loop = Loop(live, part, tracker, prepared, number, done, log_with)
                logging.enter_context(loop.logging())
            assert loop is not None
            if number < loop.progress.part:  # over before this one went on
                if part.experience is not None:
                    loop.live.begin_experience(part.experience)
                continue
            epochs = loop.fit(part, number)
            if stages:
                last = number + 1 == len(parts)
                stages.end(part.stage, loop.live, epochs, loop.progress.metrics, last)
                epochs = stages.epochs
                if not last and prepared.checkpoint is not None:
                    prepared.checkpoint.unlink(missing_ok=True)
    assert loop is not None
    loop.model.eval()
    progress = loop.progress
    delta = stages.delta() if stages else loop.live.state_dict()
    return Outcome(
        loop.live, progress.metrics, epochs, progress.reached, delta, progress.rows,
        progress.observed, progress.rounds,
    )  # fmt: skip


class Loop:
    """The parts that train one wrapped model, one after another."""

    def __init__(
        self,
        live: Wrapped,
        first: Part,
        tracker: Tracker,
        prepared: Prepared,
        number: int,
        done: int,
        log_with: Sequence[str] = (),
    ) -> None:
        self.live, self.part, self.run, self.seed = live, first, tracker, prepared.seed
        self.file, self.done = prepared.checkpoint, done  # epochs before, which the log counts, too
        self._first = (
            {k: v.clone() for k, v in live.state_dict().items()} if first.restart else None
        )
        set_seed(self.seed)
        self.accelerator = new_accelerator(first.spec, log_with, tracker.path.parent)
        self.model: nn.Module = self.accelerator.prepare(live.model)
        distributed.seed_per_rank()
        left = states.read(self.file) if self.file is not None and self.file.exists() else None
        self.progress = Progress(part=number) if left is None else states.progress(left, Progress)
        if self.progress.part < number:  # of a stage that is over
            left, self.progress = None, Progress(part=number)
        self._left = left

    def fit(self, part: Part, number: int) -> int:
        """Train a part, or what a checkpoint left of it, evaluate the model, and return the part's
        epochs."""
        progress, resumed = self.progress, self._left is not None
        before, begun = self.run.observed(), time.monotonic()
        if part.begin is not None:
            part = part.begin(self.live)
        if part.round and not resumed:
            progress.metrics = {}  # of the round before
        if self._first is not None:
            self.live.load_state_dict(self._first)
        if part.experience is not None:
            self.live.begin_experience(part.experience)
        self._begin(part)
        self._train()
        if part.experience is not None:
            with self.run.phase(f"{part.phase}/end"):
                self.live.end_experience(part.finished)
        if part.index is not None:
            self._evaluate_experiences(part.index)
        elif not progress.metrics:
            self._evaluate()
        if part.index is not None or part.round:
            spent = {q: v - before.get(q, 0.0) for q, v in self.run.observed().items()}
            spent |= {"from_s": begun, "to_s": time.monotonic()}
            progress.observed.append(None if resumed else spent)
        if part.index is not None:
            self.log(task=part.index + 1, **progress.metrics)
        if part.round:
            progress.rounds.append({"labels": len(part.images or ()), **progress.metrics})
        epochs = part.spec.epochs if part.index is not None else progress.epoch
        progress.part, progress.epoch = number + 1, 0
        return epochs

    def save(self) -> None:
        """Write the checkpoint; every process calls it, the first writes."""
        if self.file is None:
            return
        self.progress.losses = self.step.summed_losses()
        if self.accelerator.is_main_process:
            step, accelerator = self.step, self.accelerator
            states.save(
                self.file, self.live, step.optimizer, step.scheduler, accelerator, self.progress
            )

    def log(self, **values: float) -> None:
        """Record values at this moment."""
        epoch = self.done + self.progress.epoch
        self.run.log(epoch=epoch, step=self.progress.step, **values)
        if self.accelerator.log_with:
            spent = self.run.energy().value if distributed.world_size() == 1 else None
            also = {"epoch": epoch} | ({} if spent is None else {"energy_j": spent})
            self.accelerator.log(values | also, step=self.progress.step)

    def logging(self) -> Any:
        """Return the context in which the trackers asked for are at work."""
        return loggers.at_work(self.accelerator, self.run, self.part.spec, self.seed)

    def _begin(self, part: Part) -> None:
        """Get ready for a part; take up what a checkpoint left of it."""
        spec, self.part = part.spec, part
        self.accelerator.free_memory()  # forgets the optimizer of the part before
        optimizer: Any = self.accelerator.prepare(make_optimizer(self.live, spec))
        steps_per_epoch = math.ceil(part.length / spec.accumulate)
        total, warmup = steps_per_epoch * spec.epochs, round(spec.warmup_epochs * steps_per_epoch)
        self.live.plan(total, self.seed)
        check_visits(self.live, part.images is not None)
        check_wants(self.live, part)
        self.live.assess_with(lambda: part.evaluator.loss_on_held_out(self.live, self.accelerator))
        self._epoch_length: int | None = None  # batches, where a technique chooses the images
        self._begin_feeds(part)
        scheduler = LambdaLR(
            optimizer.optimizer,
            lambda step: lr_factor(
                self._position(step, steps_per_epoch), total, warmup, spec.schedule
            ),
        )
        self.step = Step(self.live, self.model, part, self.accelerator, optimizer, scheduler)
        if self._left is not None:
            assert self.file is not None
            with states.believed(self.file):
                states.restore(self._left, self.live, optimizer, scheduler, self.accelerator)
            self._left = None
            distributed.seed_per_rank()
            self.run.note(f"resumed at epoch {self.progress.epoch}, batch {self.progress.batch}")
        if part.index is None and (why := part.evaluator.without_classifier(self.live)):
            self.run.note(f"{part.phase}: {why}")
        if spec.target is not None and part.evaluator.held_out is None:
            self.run.note(
                f"train.target was looked for on test images: the {part.task.primary.name} is "
                "better than new images would show"
            )

    def _begin_feeds(self, part: Part) -> None:
        """Open the second streams of images that techniques draw from."""
        check_feeds(self.live, part.feeds)
        for name in self.live.wanted:
            images = part.feeds[name]
            self.live.feed(**{name: data.Feed(images, part.spec.batch_size, self.seed)})
            if name != "train":  # which is counted as labelled
                self.run.images({"unlabeled": "unlabelled"}.get(name, name), len(images))

    def _train(self) -> None:
        """Train all epochs of the part, or what a checkpoint left of them."""
        part, spec, progress = self.part, self.part.spec, self.progress
        first = progress.step
        while progress.epoch < spec.epochs and not progress.reached:
            self._epoch()
            last = progress.epoch == spec.epochs
            due = last or (spec.eval_every and progress.epoch % spec.eval_every == 0)
            if part.index is None and due:
                self._evaluate()
            self.save()
        if progress.step > first + 1 and (still := self.live.unmoved()):
            raise GreenvisError(
                f"{some(still)}: none of the parameters it trains has moved in "
                f"{progress.step - first} steps; is lr 0, or do "
                "they get no gradient?"
            )

    def _epoch(self) -> None:
        live, model, part, progress = self.live, self.model, self.part, self.progress
        accelerator, every = self.accelerator, part.spec.checkpoint_every_s
        model.train()
        save_at, due = time.monotonic() + every, False
        self.step.begin_losses(progress.losses)
        loss: Tensor | None = None
        epoch = self.done + progress.epoch
        loader = shared(accelerator, self._batches(epoch))
        steps = self.run.steps(
            Steady(loader), f"{part.phase}/epoch{progress.epoch + 1}",
            progress=self.run.on_log is None,  # else that shows it
        )  # fmt: skip
        for number, (x, y, *positions) in enumerate(steps):
            if part.samples is not None:
                live.set_samples(part.samples(epoch, positions[0]))
            if part.domains is not None:
                live.set_domains(part.domains[positions[0].cpu()])
            live.feeds.number = progress.batches
            with accelerator.accumulate(model):
                loss = self.step(x, y, first=number == 0)
            progress.batch += 1
            progress.batches += 1
            progress.step += accelerator.sync_gradients
            if number % CHECK_EVERY == 0:
                check_finite(loss, progress, self.run.notes)
            if number % CHECK_EVERY == 0 or distributed.world_size() == 1:
                due |= distributed.on_main(lambda at=save_at: time.monotonic() > at)
            if accelerator.sync_gradients and due:
                self.save()
                save_at, due = time.monotonic() + every, False
        live.set_samples(None)
        live.set_domains(None)
        live.epoch_end()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if loss is not None:
            check_finite(loss, progress, self.run.notes)
        total, weights = self.step.summed_losses()
        self.step.begin_losses((0.0, 0.0))
        progress.losses = (0.0, 0.0)
        if weights > 0:
            self.log(loss=total / weights)

    def _batches(self, epoch: int) -> Any:
        """Return the epoch's batches, from the one that is next."""
        part, start = self.part, self.progress.batch
        visits = None if part.images is None else self.live.visit(epoch, part.images)
        if visits is None:
            self._epoch_length = None
            return part.batches(epoch, start)
        if not len(visits):
            raise GreenvisError(f"no image is left to visit in epoch {epoch + 1}: choose more")
        self._epoch_length = math.ceil(len(visits) / part.spec.batch_size)
        return part.batches(epoch, start, visits=visits)

    def _position(self, step: int, steps_per_epoch: int) -> float:
        """Return where a schedule stands after so many steps: epochs count alike, however many
        images they visit."""
        if self._epoch_length is None:
            return step
        accumulate, done = self.part.spec.accumulate, self.progress.batch + 1
        share = math.ceil(done / accumulate) / math.ceil(self._epoch_length / accumulate)
        return (self.progress.epoch + share) * steps_per_epoch

    def _evaluate(self) -> None:
        evaluator, progress = self.part.evaluator, self.progress
        target, held_out = self.part.spec.target, None
        with self.run.phase("eval"):
            progress.metrics = evaluator.on_test(self.live, self.accelerator)
            if target is not None:
                held_out = evaluator.on_held_out(self.live, self.accelerator)
        primary = self.part.task.primary
        beside = {} if held_out is None else {f"held_out_{primary.name}": held_out}
        self.log(**progress.metrics, **beside)
        if target is not None:
            value = progress.metrics[primary.name] if held_out is None else held_out
            progress.reached = value >= target if primary.higher_is_better else value <= target

    def _evaluate_experiences(self, index: int) -> None:
        """Test all experiences, and note a row of each matrix."""
        progress, evaluator = self.progress, self.part.evaluator
        with self.run.phase(f"eval/task{index + 1}"):
            rows = evaluator.on_experiences(self.live, index, self.accelerator)
        for name, row in rows.items():
            if name not in progress.rows:
                progress.rows[name] = [[None] * len(row) for _ in range(evaluator.learned_at_once)]
            progress.rows[name].append([*row])
        mean = math.fsum(rows[MATRIX]) / len(rows[MATRIX])
        progress.metrics = {self.part.task.primary.name: mean}
