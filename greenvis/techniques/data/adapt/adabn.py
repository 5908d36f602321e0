"""Batch norms that go by the statistics of the domain the model is to work in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.core.technique import Installed, Technique
from greenvis.errors import GreenvisError
from greenvis.techniques._shared.norms import batch_norms, batch_statistics, require_norms


class Moments:
    """Mean and variance by channel of all that it is shown, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in activations (batch, channels, …)."""
        axes = [i for i in range(x.dim()) if i != 1]
        values = x.detach().double()
        self.count += values.numel() // values.shape[1]
        self.total = self.total + values.sum(axes)
        self.squares = self.squares + values.square().sum(axes)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, (channels,) each."""
        mean = torch.as_tensor(self.total) / self.count
        spread = torch.as_tensor(self.squares) / self.count - mean.square()
        return mean, spread.clamp_min(0) * (self.count / max(self.count - 1, 1))


class Adabn(Technique):
    """Give batch norms the statistics of the target domain, without labels or gradients (AdaBN: Li
    et al., 2016).

    Costs one forward over the target images before each evaluation, and nothing when served. The
    cheapest adaptation there is, and often most of what dearer ones gain; useless where domains
    differ in more than their statistics, harmful where the target's classes are in other shares.
    Draws from the stream "target". Training goes on with the source's statistics, `merge` leaves
    the target's in the model.

    Example:
        >>> live = gv.wrap(resnet, gv.Adabn())
        >>> live.feed(target=[x, x.flip(0)])  # batches of images
        >>> with live.served() as adapted:
        ...     answers = adapted.eval()(x)
    """

    name = "adabn"
    stage = "objective"
    neutral = None  # another domain's statistics are others

    images: int | None = Field(
        default=None, gt=1, description="target images to look at, at most; all where absent"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is. Raises BadInput where it has no batch norms."""
        require_norms(model, self.name)
        return InstalledAdabn(self, model)


class InstalledAdabn(Installed):
    """Statistics of the target, estimated whenever the model is to answer."""

    wants = ("target",)

    def __init__(self, request: Adabn, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self._norms = list(batch_norms(model).values())
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # those estimated, and since no step

    def step_end(self) -> None:
        """Forget statistics of earlier weights."""
        self._buffers.clear()

    @contextmanager
    def served(self) -> Iterator[None]:
        """Hold the target's statistics in the batch norms."""
        before = [(mean.clone(), variance.clone()) for mean, variance in self._statistics()]
        self.estimate()
        self.merge()
        try:
            yield
        finally:
            self._put(before)

    def estimate(self) -> None:
        """Go through the target once, unless nothing has changed since."""
        if self._buffers:
            return
        moments = {id(m): Moments() for m in self._norms}
        device = next(p.device for p in self.model.parameters())
        hooks = [m.register_forward_pre_hook(partial(_look, moments[id(m)])) for m in self._norms]
        shown, most = 0, sys.maxsize if self.request.images is None else self.request.images
        with self.phase("adapt"), removing(hooks), batch_statistics(self.model), torch.no_grad():
            for batch in self.feeds.sweep("target", device):
                x = batch[: most - shown]
                if len(x) > 1:  # of one image alone a batch norm has nothing to say
                    self.model(x)
                    shown += len(x)
                if shown + 1 >= most:
                    break
        if not shown:
            raise GreenvisError("adabn saw no batch of the target: its stream is empty")
        self._buffers = {key: m.result() for key, m in moments.items() if m.count}

    def merge(self) -> None:
        """Leave the target's statistics in the batch norms."""
        if not self._buffers:
            self.estimate()
        pairs = zip(self._norms, self._statistics(), strict=True)
        self._put([self._buffers.get(id(norm), own) for norm, own in pairs])

    def _statistics(self) -> list[tuple[Any, Any]]:
        """Return the running mean and variance of each norm, (channels,) each, not copied."""
        return [(norm.running_mean, norm.running_var) for norm in self._norms]

    def _put(self, values: list[tuple[Any, Any]]) -> None:
        with torch.no_grad():
            for (mean, variance), new in zip(self._statistics(), values, strict=True):
                mean.copy_(new[0])
                variance.copy_(new[1])


def _look(moments: Moments, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    moments.add(args[0])
