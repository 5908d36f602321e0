"""One training step: forward, backward, optimizer, and what techniques hear of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from greenvis.core import distributed
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.experiment.mixing import Mixing
from greenvis.experiment.parts import Part
from greenvis.experiment.progress import Progress
from greenvis.experiment.recipe import TrainSpec


class Step:
    """A step of one part's training, on a batch.

    Args:
        live: The wrapped model.
        model: The same, as the accelerator prepared it.
        part: What is trained on.
        accelerator: Its own.
        optimizer: Prepared by it.
        scheduler: Of the learning rate.

    Attributes:
        losses: Of the epoch so far, the sum of this process's losses by weight, and that of their
            weights.
    """

    def __init__(
        self,
        live: Wrapped,
        model: nn.Module,
        part: Part,
        accelerator: Accelerator,
        optimizer: Any,
        scheduler: LambdaLR,
    ) -> None:
        self.live, self.model, self.part, self.accelerator = live, model, part, accelerator
        self.optimizer, self.scheduler = optimizer, scheduler
        check_again(live, part.spec)
        self.mixing = Mixing(part.spec.mixup, part.spec.cutmix)
        task_loss = self.mixing.loss(part.loss or part.task.loss)
        self.criterion: Callable[..., Tensor] = live.criterion(task_loss)
        self._mean = distributed.SampleMean()
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.losses = torch.zeros(2, dtype=exact, device=accelerator.device)

    def __call__(self, x: Any, y: Any, first: bool) -> Tensor:
        """Train on a batch, and return its loss.

        Args:
            x: Images (batch, channels, height, width), or what the model takes.
            y: Their labels.
            first: Whether it is the first since the training began or went on.
        """
        live, accelerator, spec = self.live, self.accelerator, self.part.spec
        x, y = live.batch(self.mixing.batch(x, y), y)
        loss = self._loss(x, y)
        weight = self._mean.weight(len(y))
        shares = [loss.detach() * weight, torch.as_tensor(weight, device=loss.device)]
        self.losses += torch.stack([share.to(self.losses.dtype) for share in shares])
        accelerator.backward(loss * weight)
        if first:
            _all_reached(live)
        live.again(lambda: accelerator.backward(self._loss(x, y) * weight))
        if accelerator.sync_gradients:
            parameters = self.model.parameters()
            self._mean.rescale(parameters, spec.accumulate * distributed.world_size())
            if spec.clip_norm is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), spec.clip_norm)
        self.optimizer.step()
        if accelerator.sync_gradients:
            self.scheduler.step()
            live.step_end()
        self.optimizer.zero_grad()
        return loss

    def _loss(self, x: Any, y: Any) -> Tensor:
        """Return the loss of a batch that `live.batch` returned, a scalar."""
        with self.accelerator.autocast():
            if self.live.pretext:
                return self.live.loss(x, y, None)
            outputs = self.part.task.answer(self.model, x, y)
            return self.criterion(outputs, y) + self.live.loss(x, y, outputs)

    def begin_losses(self, losses: tuple[float, float]) -> None:
        """Begin an epoch's sums, where a checkpoint left them; the first process goes on with
        them."""
        self.losses.zero_()
        if distributed.rank() == 0:
            self.losses += torch.tensor(losses, dtype=self.losses.dtype, device=self.losses.device)

    def summed_losses(self) -> tuple[float, float]:
        """Return the sums of all processes; each of them calls it, and waits for the device."""
        total = self.losses.clone()
        distributed.all_reduce_mean([total])
        loss, weight = (total * distributed.world_size()).tolist()
        return loss, weight


def check_again(live: Wrapped, spec: TrainSpec) -> None:
    """Raise BadInput where a technique wants a step's backward again, and the step is none that can
    be run again."""
    names = some([t.name for t, _ in live.using("again")])
    if names and spec.accumulate > 1:
        raise BadInput(
            f"{names} runs the backward of each step again, and train.accumulate="
            f"{spec.accumulate} takes a step of several batches, of which the last alone is there: "
            "leave accumulate out, or name other techniques"
        )
    if names and spec.precision == "fp16":
        raise BadInput(
            f"{names} runs the backward of each step again, and train.precision=fp16 scales "
            "gradients, whose overflow is looked for once a step: set precision to bf16 or no"
        )


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


def check_finite(loss: Tensor, progress: Progress, notes: Sequence[str]) -> None:
    """Raise GreenvisError in every process where a loss is not finite in one of them."""
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


class Steady:
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
