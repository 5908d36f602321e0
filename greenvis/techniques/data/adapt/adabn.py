"""Batch norms that go by the statistics of the domain the model is to work in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field
from torch import nn

from greenvis.core.technique import Installed, Technique
from greenvis.errors import GreenvisError
from greenvis.techniques._shared.norms import Statistics, require_norms


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
