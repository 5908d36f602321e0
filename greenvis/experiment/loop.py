"""The one training loop, on accelerate: metered, checkpointed, resumable to the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from greenvis.core import distributed
from greenvis.core.technique import Samples
from greenvis.core.wrap import Wrapped
from greenvis.errors import GreenvisError, some
from greenvis.experiment import checkpoint as states
from greenvis.experiment import loggers
from greenvis.experiment.evaluate import evaluate, shared
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.track import Tracker
from greenvis.tasks.base import Task

CHECK_EVERY = 50  # steps between looks at the loss: a look waits for the device


@dataclass
class Progress:
    """How far a training has come; saved in its checkpoint.

    Of a stream, task: which; rows: accuracies on its tasks, a row a task; observed: what each task
    took, None where it was interrupted.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    accuracy: float | None = None
    reached: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    task: int = 0
    rows: dict[str, list[list[float | None]]] = field(default_factory=dict)
    observed: list[dict[str, float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """What to train on: a data set, or one task of a stream.

    batches(epoch, start): the epoch's batches (x, y) from number `start` on, in an order that
    (seed, epoch) fixes; with
    `samples`, of (x, y, positions), and samples(epoch, positions) says which samples those are.
    length: batches an epoch.
    done: epochs trained before this part, which the log counts, too. task_loss(logits, y): the
    task's where absent.
    """

    batches: Callable[[int, int], Iterable[Any]]
    length: int
    samples: Callable[[int, Tensor], Samples] | None = None
    phase: str = "train"
    done: int = 0
    task_loss: Callable[[Tensor, Any], Tensor] | None = None


def fit(
    live: Wrapped,
    batches: Callable[[int, int], Iterable[Any]],
    batches_per_epoch: int,
    test_batches: Callable[[], Iterable[Any]],
    spec: TrainSpec,
    run: Tracker,
    *,
    task: Task,
    seed: int = 0,
    checkpoint: Path | None = None,
    log_with: Sequence[str] = (),
    samples: Callable[[int, Tensor], Samples] | None = None,
    phase: str = "train",
    done: int = 0,
    score: Callable[[nn.Module], float] | None = None,
    held_out: Callable[[], Iterable[Any]] | None = None,
) -> Progress:
    """Train `live` and return how it ended; the model is left in eval mode on its device.

    batches, batches_per_epoch, samples, phase, done: see `Part`.
    held_out: batches on which `spec.target_accuracy` is looked for; the test's where None, which
    the record then says. score(model): what stands for the accuracy where no classifier is trained.
    checkpoint: a file to write as training goes and to go on from if it is there; removed by nobody
    here.
    log_with: accelerate's trackers (`loggers.LOGGERS`) that get accuracy, loss and the joules so
    far, too, in the record's folder; of several processes the first logs, without joules, which
    only a report adds up. Those train on their shares of each batch
    (`greenvis.core.distributed.split_batches`): batches must come in a DataLoader. Raises
    GreenvisError when the loss is no longer finite, BadInput for a tracker that is not installed.
    """
    loop = Loop(live, spec, run, task, seed, checkpoint, log_with)
    loop.begin(Part(batches, batches_per_epoch, samples, phase, done))
    progress, name = loop.progress, task.primary.name
    target = spec.target_accuracy or math.inf
    if target <= 1 and held_out is None:
        run.note(
            "train.target_accuracy was looked for on test images: the accuracy is better than new "
            "images would show"
        )

    def test() -> None:
        with run.phase("eval"):
            model = loop.accelerator.unwrap_model(loop.model)
            distributed.sync(model.buffers())  # statistics of batch norms are each process's own
            if score is not None:
                accuracy = distributed.on_main(partial(score, model))
            else:
                accuracy = evaluate(model, test_batches(), task, loop.accelerator)[name]
            held_out_accuracy = (
                evaluate(model, held_out(), task, loop.accelerator)[name]
                if target <= 1 and held_out is not None
                else None
            )
        loop.log(
            accuracy=accuracy,
            **({} if held_out_accuracy is None else {"held_out_accuracy": held_out_accuracy}),
        )
        progress.history.append({"epoch": progress.epoch, "accuracy": accuracy})
        progress.accuracy, progress.reached = (
            accuracy,
            (accuracy if held_out_accuracy is None else held_out_accuracy) >= target,
        )

    with loop.logging():
        loop.train(test)
        if progress.accuracy is None:
            test()
    loop.model.eval()
    return progress


class Loop:
    """One training under way, on one part after another. Each part has an optimizer and a schedule
    of its own."""

    def __init__(
        self,
        live: Wrapped,
        spec: TrainSpec,
        run: Tracker,
        task: Task,
        seed: int,
        file: Path | None,
        log_with: Sequence[str] = (),
    ) -> None:
        set_seed(seed)
        self.live, self.spec, self.run, self.task = live, spec, run, task
        self.seed, self.file = seed, file
        self.accelerator = _accelerator(spec, log_with, run.path.parent)
        self.model: nn.Module = self.accelerator.prepare(live.model)
        self.mean = distributed.SampleMean()
        distributed.seed_per_rank()
        self._left = states.read(file) if file is not None and file.exists() else None
        self.progress = Progress(**self._left["progress"]) if self._left is not None else Progress()

    def begin(self, part: Part) -> None:
        """Get ready for a part; take up what a checkpoint left of it."""
        spec, self.part = self.spec, part
        self.accelerator.free_memory()  # forgets the optimizer of the part before
        self.optimizer: Any = self.accelerator.prepare(make_optimizer(self.live, spec))
        steps_per_epoch = math.ceil(part.length / spec.accumulate)
        total, warmup = steps_per_epoch * spec.epochs, round(spec.warmup_epochs * steps_per_epoch)
        self.live.plan(total)
        self.scheduler = LambdaLR(
            self.optimizer.optimizer, lambda step: lr_factor(step, total, warmup, spec.schedule)
        )
        self.criterion = self.live.criterion(part.task_loss or self.task.loss)
        if self._left is not None:
            states.take_up(self._left, self.live, self.optimizer, self.scheduler, self.accelerator)
            self._left = None
            distributed.seed_per_rank()
            self.run.note(f"resumed at epoch {self.progress.epoch}, batch {self.progress.batch}")

    def save(self) -> None:
        """Write the checkpoint."""
        if self.file is not None and self.accelerator.is_main_process:
            states.save(
                self.file,
                self.live,
                self.optimizer,
                self.scheduler,
                self.accelerator,
                self.progress,
            )

    def log(self, **values: float) -> None:
        """Record values at this moment."""
        epoch = self.part.done + self.progress.epoch
        self.run.log(epoch=epoch, step=self.progress.step, **values)
        if self.accelerator.log_with:
            spent = self.run.energy().value if distributed.world_size() == 1 else None
            also = {"epoch": epoch} | ({} if spent is None else {"energy_j": spent})
            self.accelerator.log(values | also, step=self.progress.step)

    def logging(self) -> AbstractContextManager[None]:
        """Return the context in which the trackers asked for are at work."""
        return loggers.at_work(self.accelerator, self.run, self.spec, self.seed)

    def train(self, test: Callable[[], None] | None = None) -> None:
        """Train all epochs of the part, or what a checkpoint left of them; test: what to do for an
        evaluation."""
        spec, progress = self.spec, self.progress
        first = progress.step
        while progress.epoch < spec.epochs and not progress.reached:
            self._epoch()
            due = (
                spec.eval_every and progress.epoch % spec.eval_every == 0
            ) or progress.epoch == spec.epochs
            if test is not None and due:
                test()
            self.save()
        if progress.step > first + 1 and (still := self.live.unmoved()):
            raise GreenvisError(
                f"{some(still)}: none of the parameters it trains has moved in "
                f"{progress.step - first} steps; is lr 0, or do "
                "they get no gradient?"
            )

    def _epoch(self) -> None:
        live, model, part, progress = self.live, self.model, self.part, self.progress
        accelerator, optimizer = self.accelerator, self.optimizer
        model.train()
        saved_at = time.monotonic()
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        loader = shared(accelerator, part.batches(progress.epoch, progress.batch))
        for x, y, *positions in self.run.steps(
            _Steady(loader), phase=f"{part.phase}/epoch{progress.epoch + 1}"
        ):
            if part.samples is not None:
                live.set_samples(part.samples(progress.epoch, positions[0]))
            with accelerator.accumulate(model):
                x, y = live.batch(x, y)
                with accelerator.autocast():
                    loss = self._loss(x, y)
                weight = self.mean.weight(len(y))
                weights.append(torch.as_tensor(weight, dtype=torch.float32, device=loss.device))
                losses.append(loss.detach() * weight)
                accelerator.backward(loss * weight)
                if len(losses) == 1:
                    _all_reached(live)
                if accelerator.sync_gradients:
                    self.mean.rescale(
                        model.parameters(), self.spec.accumulate * distributed.world_size()
                    )
                if accelerator.sync_gradients and self.spec.clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), self.spec.clip_norm)
                optimizer.step()
                if accelerator.sync_gradients:
                    self.scheduler.step()
                    live.step_end()
                    progress.step += 1
                optimizer.zero_grad()
            progress.batch += 1
            if len(losses) % CHECK_EVERY == 1:
                _finite(loss, progress, self.run.notes)
            if (
                accelerator.sync_gradients
                and time.monotonic() - saved_at > self.spec.checkpoint_every_s
            ):
                self.save()
                saved_at = time.monotonic()
        live.set_samples(None)
        live.epoch_end()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if losses:
            _finite(losses[-1], progress, self.run.notes)
            sums = torch.stack([torch.stack(values).float().sum() for values in (losses, weights)])
            distributed.all_reduce_mean([sums])
            self.log(loss=(sums[0] / sums[1]).item())

    def _loss(self, x: Any, y: Any) -> Tensor:
        if self.live.pretext:
            return self.live.loss(x, y, None)
        outputs = self.task.outputs(self.model(x))
        return self.criterion(outputs, y) + self.live.loss(x, y, outputs)


def _all_reached(live: Wrapped) -> None:
    """Raise GreenvisError where several processes would wait for a gradient that does not come."""
    without = (
        []
        if distributed.world_size() == 1 or live.pretext
        else [n for n, p in live.trainable.items() if p.grad is None]
    )
    if without:
        problem = f"{some(without)} got no gradient, and several processes wait for each other's"
        raise distributed.report_once(
            GreenvisError(
                f"{problem}: freeze what the loss does not reach, or train as one process"
            )
        )


def make_optimizer(live: Wrapped, spec: TrainSpec) -> Optimizer:
    """Return the optimizer over the techniques' groups; weight decay spares biases and norms (1-D
    parameters)."""
    groups = []
    for group in live.param_groups(spec.lr):
        for decays in (True, False):
            chosen = [p for p in group["params"] if (p.ndim > 1) == decays]
            if chosen:
                decay = group.get("weight_decay", spec.weight_decay)
                groups.append({**group, "params": chosen, "weight_decay": decay if decays else 0.0})
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.optimizer](
        groups, lr=spec.lr
    )


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the learning rate at optimizer step `step` (0-based): linear warm-up,
    then the schedule to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[
        schedule
    ]


def _accelerator(
    spec: TrainSpec, log_with: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Return a fresh accelerator: its state is global, and arms of one process may differ in
    precision."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != spec.precision:
        AcceleratorState._reset_state()
    GradientState._reset_state()
    distributed.refuse_sharding()
    loggers.check(log_with)
    logging: dict[str, Any] = (
        {"log_with": list(log_with), "project_dir": folder} if log_with else {}
    )
    return Accelerator(
        mixed_precision=spec.precision, gradient_accumulation_steps=spec.accumulate, **logging
    )


def _finite(loss: Tensor, progress: Progress, notes: Sequence[str]) -> None:
    shared = loss.detach().clone()
    distributed.all_reduce_mean([shared])  # what is not finite in one process ends all
    value = shared.item()
    if not math.isfinite(value):
        before = f" (noted before: {notes[-1]})" if notes else ""
        problem = (
            f"the loss is {value} at epoch {progress.epoch}, step {progress.step}: lower train.lr, "
            "set train.clip_norm, "
        )
        raise distributed.report_once(GreenvisError(f"{problem}or look at the data{before}"))


class _Steady:
    """A loader whose start draws nothing from torch's random state: resuming in mid-epoch starts
    one more than not."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        state = torch.get_rng_state()
        items = iter(self.loader)
        first = next(items, None)
        torch.set_rng_state(state)
        if first is not None:
            yield first
            yield from items


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Use `number` CPU threads within; None leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
