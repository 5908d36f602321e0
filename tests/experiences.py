"""A stream of tasks of two classes each, trained by hand, whose tests say which task an image is
of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.core.technique import Experience, logits_of
from greenvis.core.wrap import Wrapped


def task(index: int) -> Experience:
    """Return one of three experiences."""
    return Experience(index, (index, index + 1), tuple(range(index + 2)), 3, known=True)


def batch(shape: tuple[int, ...], index: int, step: int) -> tuple[Tensor, Tensor]:
    """Return four images (4, *shape) of an experience, and their labels."""
    generator = torch.Generator().manual_seed(100 * index + step)
    return torch.rand(4, *shape, generator=generator), torch.arange(4) % 2 + index


def train(
    live: Wrapped, shape: Any, tasks: range, steps: int = 2, begin: int = 0, end: bool = True
) -> None:
    """Train on experiences one after another.

    begin: the first one's step to go on from; end: whether the techniques hear of each one's end.
    """
    for index in tasks:
        first = begin if index == tasks[0] else 0
        if not first:
            live.begin_experience(task(index))
        optimizer = torch.optim.AdamW(live.param_groups(1e-2), weight_decay=0.1)
        for step in range(first, steps):
            live.model.train()
            torch.manual_seed(step)
            x, y = live.batch(*batch(shape, index, step))
            logits = logits_of(live.model(x))
            (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
            optimizer.step()
            optimizer.zero_grad()
            live.step_end()
        if end:
            live.end_experience([batch(shape, index, step) for step in range(2)])
    live.model.eval()


def predict(live: Wrapped, x: Tensor, told: int | None = None) -> Tensor:
    """Return the logits of images, whose task a test says or, None, does not."""
    live.eval_experience(None if told is None else task(told))
    with torch.no_grad():
        out = logits_of(live.model.eval()(x))
    live.eval_experience(None)
    return out
