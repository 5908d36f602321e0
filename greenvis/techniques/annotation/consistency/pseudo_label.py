"""Learning from unlabelled images by the model's own sure answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.techniques.annotation.consistency._unlabelled import Unlabelled
from greenvis.techniques.annotation.consistency._weights import sure


class PseudoLabel(Technique):
    """Take the model's sure answers to unlabelled images for labels (pseudo-labels: Lee, 2013,
    equation 15).

    Saves labels, not energy: a step takes 1 + mu times the images. With few labels it gains little
    or loses, as wrong answers teach themselves; `consistency`, which teaches a strong view, is the
    stronger one at (1 + 2 mu) times the images. The loss is a mean over all unlabelled images, and
    its weight grows over the first 40 % of the training. Adds the term "pseudo_label". Draws from
    the stream "unlabeled"; its rows have the label -1: a loop of your own takes its loss from
    `live.criterion(F.cross_entropy)`.

    Example:
        >>> live = gv.wrap(model, gv.PseudoLabel(mu=1))
        >>> live.feed(unlabeled=[x])  # a loader of images
        >>> images, labels = live.batch(x, y)
        >>> len(images) == 2 * len(x)
        True
    """

    name = "pseudo_label"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it takes the likeliest of one class per image for its label: leave it out"
    needs = frozenset({"gradients"})
    examples: ClassVar = ({"threshold": 0.1},)

    mu: int = Field(
        default=3, ge=1, description="unlabelled batches per step, each of the labelled one's size"
    )
    weight: float = Field(default=1.0, ge=0, description="factor of the term")
    warmup: float = Field(
        default=0.4, ge=0, le=1, description="share of the training in which the factor grows"
    )
    threshold: float = Field(
        default=0.95, ge=0, lt=1, description="the least probability that is taken for sure"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledPseudoLabel(self, model)


class InstalledPseudoLabel(Unlabelled):
    """Pseudo-labels at work."""

    def __init__(self, request: PseudoLabel, model: nn.Module) -> None:
        super().__init__(request.name, model, request.weight, request.warmup)
        self.request = request

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Put the unlabelled images behind the labelled ones."""
        self.check(x, y)
        return self.put_behind(
            x, y, [self.feed("unlabeled", x.device, self.request.mu).to(x.dtype)]
        )

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"pseudo_label": weight · mean of the sure images' cross entropy}."""
        own = self.answers(logits)
        weights = sure(own.detach().softmax(1), self.request.threshold)
        losses = F.cross_entropy(own, own.detach().argmax(1), reduction="none")
        return self.term((weights * losses).mean(), weights)
