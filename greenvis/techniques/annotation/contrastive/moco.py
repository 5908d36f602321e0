"""Contrastive pretraining against many keys of a slower copy, which batches need not be large
for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, OnlyWith
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques.annotation.contrastive._views import InstalledFollowed, ViewPretext, mlp


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of telling a query's key from the negatives, by cosine (MoCo: He et
    al., 2020, equation 1).

    Args:
        queries: (batch, dim).
        keys: (batch, dim), each query's own; no gradient flows there.
        negatives: (number, dim), keys of other images.
        temperature: Divides the cosines.

    Returns:
        The mean over the batch, a scalar.
    """
    q, k, rest = (F.normalize(t.float(), dim=1) for t in (queries, keys.detach(), negatives))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rest.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return 2 · temperature times the cross entropy of telling a query's key from those of the
    rest of the batch, by cosine (MoCo v3: Chen et al., 2021, algorithm 1).

    Args:
        queries: (batch, dim).
        keys: (batch, dim), each query's own; no gradient flows there.
        temperature: Divides the cosines.

    Returns:
        The mean over the batch, a scalar.
    """
    q, k = (F.normalize(t.float(), dim=1) for t in (queries, keys.detach()))
    own = torch.arange(len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(q @ k.T / temperature, own)


class Moco(ViewPretext):
    """Pretrain a model to tell a slower copy's look at an image from its look at others (MoCo v2:
    Chen et al., 2020; v3: Chen et al., 2021).

    Saves labels, not energy: a step of v2 costs 1.3 times a supervised one (a view forward and
    backward, another forward), the cheapest of the pretexts by views; one of v3 2.7 times. v2 tells
    a view from a queue of keys of earlier batches, v3, with a predictor and both directions, from
    those of its batch. A pretext: labels are not used, and the classifier stays untrained. Adds the
    term "moco", from heads beside the classifier that `merge` drops. The queue lies in the
    checkpoint; each of several processes has its own. Loses where the queue holds the image's own
    earlier keys: keep it well below the number of images (the paper's 65,536 are 5 % of its).

    Example:
        >>> live = gv.wrap(model, gv.Moco(queue=64))
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "moco"
    rank_local = True
    only_with: ClassVar[OnlyWith] = {"queue": ("version", ("v2",))}
    examples = ({"dim": 8, "queue": 16}, {"dim": 8, "version": "v3"})

    version: Literal["v2", "v3"] = Field(
        default="v2", description="against a queue, or against the batch with a predictor"
    )
    queue: int = Field(default=4096, ge=2, description="keys of earlier batches")
    temperature: float = Field(
        default=0.2, gt=0, description="divides the cosines: smaller looks at the nearest more"
    )
    momentum: float = Field(
        default=0.99, ge=0, le=1, description="share of the target that a step leaves, at first"
    )
    dim: int = Field(default=128, ge=2, description="width of the projection")

    def install(self, model: nn.Module) -> Installed:
        """Put the heads in. Raises BadInput for a model that shows no classifier."""
        representation = self.represent(model)
        width = representation.dim
        if self.version == "v2":
            heads: dict[str, nn.Module] = {"project": mlp(width, width, self.dim)}
            return InstalledMoco(self, representation, heads)
        heads = {
            "project": mlp(width, 2 * width, self.dim, norm=True),
            "predict": mlp(self.dim, 2 * width, self.dim, norm=True),
        }
        return InstalledMoco(self, representation, heads)


class InstalledMoco(InstalledFollowed[Moco]):
    """Contrast with the target's keys."""

    def __init__(
        self, request: Moco, representation: Representation, heads: dict[str, nn.Module]
    ) -> None:
        predictors = tuple(name for name in heads if name == "predict")
        super().__init__(request, representation, heads, request.momentum, predictors)
        size = (request.queue if request.version == "v2" else 0, request.dim)
        like = next(heads["project"].parameters())
        self.queue = F.normalize(torch.randn(size, device=like.device), dim=1)
        self.next = torch.zeros((), dtype=torch.int64)  # where the next keys go

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"moco"}: the contrast of two views of images x (batch, channels, height,
        width)."""
        request, views = self.request, self.request.views(x)
        if request.version == "v3":
            queries = self.heads["predict"](self.project(views)).chunk(2)
            keys = self.target(views).chunk(2)
            pairs = zip(queries, keys[::-1], strict=True)
            losses = [contrast(q, k, request.temperature) for q, k in pairs]
            return {"moco": torch.stack(losses).sum()}
        first, second = views.chunk(2)
        queries, keys = self.project(first), self.target(second)
        self.queue = self.queue.to(keys.device)
        loss = info_nce(queries, keys, self.queue.clone(), request.temperature)
        if not self.repeated:
            self._enqueue(F.normalize(keys.float(), dim=1))
        return {"moco": loss}

    def _enqueue(self, keys: Tensor) -> None:
        """Put keys (batch, dim) in the place of the oldest."""
        size = len(self.queue)
        rows = (int(self.next) + torch.arange(len(keys))) % size
        self.queue[rows[-size:].to(keys.device)] = keys[-size:]
        self.next.copy_((self.next + len(keys)) % size)

    def own_state(self) -> dict[str, Tensor]:
        """Return the queue, and where its next keys go."""
        return {"queue": self.queue, "next": self.next} if len(self.queue) else {}
