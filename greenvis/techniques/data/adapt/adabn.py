"""Batch norms that go by the statistics of the domain the model is to work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import forwarding, removing
from greenvis.core.technique import Installed, OnlyWith, Technique
from greenvis.errors import GreenvisError
from greenvis.techniques._shared.norms import Statistics, batch_norms, require_norms


class Adabn(Technique):
    """Give batch norms the statistics of the target domain, without labels or gradients (AdaBN: Li
    et al., 2016).

    The cheapest adaptation there is, and often most of what dearer ones gain; useless where domains
    differ in more than their statistics, harmful where the target's classes are in other shares.
    statistics: target: those of all images of the stream "target", at one forward over them before
    each evaluation, and nothing when served; `merge` leaves them in the model. stream: those of
    what was answered so far, the batch under way included, beside the source's, which count as
    `prior` images (Schneider et al., 2020): no target images before, no more than sums when served,
    right for single images, too; a stream sorted by class misleads it at first, and no file holds
    what it will answer. Training goes on with the source's statistics.

    Example:
        >>> live = gv.wrap(resnet, gv.Adabn())
        >>> live.feed(target=[x, x.flip(0)])  # batches of images
        >>> with live.served() as adapted:
        ...     answers = adapted.eval()(x)
    """

    name = "adabn"
    stage = "objective"
    neutral = None  # another domain's statistics are others

    only_with: ClassVar[OnlyWith] = {
        "images": ("statistics", ("target",)), "prior": ("statistics", ("stream",)),
    }  # fmt: skip
    examples: ClassVar = ({}, {"statistics": "stream"})

    statistics: Literal["target", "stream"] = Field(
        default="target", description="of which images: given ahead, or those that are answered"
    )
    images: int | None = Field(
        default=None, gt=1, description="target images to look at, at most; all where absent"
    )
    prior: int = Field(default=16, ge=0, description="images that the source's statistics count as")

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is. Raises BadInput where it has no batch norms."""
        require_norms(model, self.name)
        made = InstalledAdabn if self.statistics == "target" else StreamStatistics
        return made(self, model)


class InstalledAdabn(Installed):
    """Statistics of the target, estimated whenever the model is to answer."""

    wants = ("target",)

    def __init__(self, request: Adabn, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self._statistics = Statistics(model)

    def step_end(self) -> None:
        """Forget statistics of earlier weights."""
        self._statistics.forget()

    @contextmanager
    def served(self) -> Iterator[None]:
        """Hold the target's statistics in the batch norms."""
        with self._statistics.restored():
            self.merge()
            yield

    def merge(self) -> None:
        """Leave the target's statistics in the batch norms."""
        if not self._statistics.known:
            device = next(p.device for p in self.model.parameters())
            with self.phase("adapt"):
                seen = self._statistics.estimate(
                    self.feeds.sweep("target", device), self.request.images
                )
            if not seen:
                raise GreenvisError("adabn saw no batch of the target: its stream is empty")
        self._statistics.put()


class StreamStatistics(Installed):
    """Statistics of what is answered, as it comes."""

    adapts = True
    unmergeable = "goes by what it answers, so that no weights hold it"

    def __init__(self, request: Adabn, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self._norms: list[Any] = list(batch_norms(model).values())

    @contextmanager
    def served(self) -> Iterator[None]:
        """Have each batch's images counted, and let norms go by those so far."""
        forward, count = self.model.forward, 0
        # the first and second moment of the source's
        self._moments = [
            (m.running_mean.double(), m.running_var.double() + m.running_mean.double().square())
            for m in self._norms
        ]

        def counting(x: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            hooks = [
                norm.register_forward_pre_hook(partial(self._update, i, count))
                for i, norm in enumerate(self._norms)
            ]
            count += len(x)
            with torch.no_grad(), removing(hooks):
                return forward(x, *args, **kwargs)

        with Statistics(self.model).restored(), forwarding(self.model, counting):
            yield

    def _update(self, index: int, images: int, norm: Any, args: tuple[Tensor, ...]) -> None:
        """Take a batch into the moments of a norm, which go by images."""
        x, weight = args[0].double(), self.request.prior + images
        axes = [i for i in range(x.dim()) if i != 1]
        total = weight + len(x)
        old, new = weight / total, len(x) / total
        mean, square = self._moments[index]
        mean = old * mean + new * x.mean(axes)
        square = old * square + new * x.square().mean(axes)
        self._moments[index] = mean, square
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp_min(0))
