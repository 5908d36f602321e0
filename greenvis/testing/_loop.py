"""A few steps of training as the loop takes them, through every seam of a technique."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.example import Example
from greenvis.core.wrap import Wrapped
from greenvis.errors import some
from greenvis.tasks.base import Task


class Broken(AssertionError):
    """A point of the contract that does not hold."""


class Labelled:
    """Images of which their labels are known."""

    def __init__(self, targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)


class Stream:
    """Images beside the labelled ones, a function of the batch's number."""

    def __init__(self, like: Tensor) -> None:
        self.shape = like.shape

    def at(self, number: int, times: int) -> Tensor:
        """Return `times` batches of images."""
        generator = torch.Generator().manual_seed(number)
        return torch.rand(times * self.shape[0], *self.shape[1:], generator=generator)

    def sweep(self) -> Iterator[Tensor]:
        """Yield two batches."""
        yield from (self.at(number, 1) for number in range(2))


def arguments(example: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the arguments of an example, those that hang on the model filled in."""
    return {
        k: v(model) if callable(v) and not isinstance(v, nn.Module) else v
        for k, v in example.items()
    }


def images_of(x: Any) -> Tensor:
    """Return the images of a batch that may hold more."""
    return x.args[0] if isinstance(x, Example) else x


def fed(live: Wrapped, x: Any, y: Any) -> Wrapped:
    """Offer what a technique may ask of a loop: a second stream, domains, an assessment."""
    live.feed(**dict.fromkeys(live.wanted, Stream(images_of(x))))
    live.set_domains(torch.arange(len(y)) % 2)
    live.assess_with(lambda: 1.0)
    return live


def loss_of(live: Wrapped, task: Task, batch: tuple[Any, Any]) -> Tensor:
    """Return the loss of a batch that `live.batch` returned. Raises Broken for one without a
    gradient."""
    x, y = batch
    live.model.train()
    if live.pretext:
        loss = live.loss(x, y, None)
    else:
        outputs = task.answer(live.model, x, y)
        loss = live.criterion(task.loss)(outputs, y) + live.loss(x, y, outputs)
    if not loss.requires_grad:
        raise Broken("nothing trainable reaches the loss: it is without a gradient")
    return loss


def train(
    live: Wrapped,
    task: Task,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], tuple[Any, Any]],
    steps: range,
) -> None:
    """Train for some steps. Raises Broken for what is not finite, and for visits to images that
    there are not."""
    for step in steps:
        torch.manual_seed(step)
        live.feeds.number = step
        x, y = batch()
        visits = live.visit(step, Labelled(y))  # the batch is an epoch
        if visits is not None:
            if not (visits.min() >= 0 and visits.max() < len(y)):
                raise Broken(f"visit chooses {visits.tolist()} of {len(y)} images")
            x, y = x[visits], y[visits]
        own = live.batch(x, y)
        loss = loss_of(live, task, own)
        if not loss.isfinite():
            raise Broken(f"the loss of step {step} is {loss.item()}")
        loss.backward()
        grads = {n: p.grad for n, p in live.trainable.items() if p.grad is not None}
        if broken := [n for n, grad in grads.items() if not grad.isfinite().all()]:
            raise Broken(f"gradients of step {step} are not finite: {some(broken)}")
        live.again(lambda own=own: loss_of(live, task, own).backward())
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
    live.epoch_end()
