"""A class for each bag of images, of any backbone's embeddings, pooled where they are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.tasks.answers import logits_of

HIDDEN = 128  # units of a bag's attention


class Bags(nn.Module):
    """A class for each bag of images: their embeddings, pooled over the bag, then a linear layer.

    No bag is padded: what is computed and kept for the backward grows with the images there are.

    Args:
        backbone: A classifier; the classifier leaves it.
        structure: `structure.view` of it.
        pooling: "mean", "max", "attention" (ABMIL: Ilse et al., 2018, eq. 8), "gated" (eq. 9), or
            "transmil" (Shao et al., 2021), of torchmil, a bag at a time.
        classes: How many.
    """

    def __init__(self, backbone: nn.Module, structure: View, pooling: str, classes: int) -> None:
        super().__init__()
        if len(structure.heads) != 1:
            raise BadInput(
                f"`head: {pooling}` wants a backbone with one classifier, and this "
                f"{type(backbone).__name__} has {len(structure.heads)}"
            )
        if pooling == "transmil":
            _torchmil()  # before the backbone changes
        backbone.set_submodule(structure.heads[0], nn.Identity())
        self.backbone, self.pooling = backbone, pooling
        with torch.no_grad():
            mode = backbone.training
            width = logits_of(backbone.eval()(structure.example)).shape[1]
            backbone.train(mode)
        if pooling == "transmil":
            self.mix = _torchmil()((width,), att_dim=HIDDEN)
            self.mix.classifier = nn.Linear(HIDDEN, classes)
            return
        if pooling in ("attention", "gated"):
            self.attend = Attention(width, pooling == "gated")
        self.classify = nn.Linear(width, classes)

    def forward(self, images: Tensor, bag: Tensor | None = None) -> Tensor:
        """Return logits (bags, classes).

        Args:
            images: (rows, channels, height, width), of all bags.
            bag: Which bag each is of, int64 (rows,) from 0 on without gaps; None: each its own.
        """
        embedded = logits_of(self.backbone(images))
        if bag is None:
            bag = torch.arange(len(images), device=images.device)
        if self.pooling == "transmil":
            return torch.cat([self.mix(rows[None]) for rows in _apart(embedded, bag)])
        return self.classify(self._pooled(embedded, bag))

    def instance_scores(
        self, images: Tensor, bag: Tensor | None = None, positive: int = 1
    ) -> Tensor:
        """Return how much each image speaks for a class of its bag, (rows,): its attention, which
        asks for no class; where nothing attends, what the classifier says of it alone.

        Args:
            images: (rows, channels, height, width).
            bag: As in `forward`.
            positive: The class.
        """
        embedded = logits_of(self.backbone(images))
        if bag is None:
            bag = torch.arange(len(images), device=images.device)
        if self.pooling == "transmil":
            each = _apart(embedded, bag)
            weights = [self.mix(rows[None], return_att=True)[1][0] for rows in each]
            order = torch.cat([(bag == number).nonzero()[:, 0] for number in range(len(each))])
            return torch.cat(weights)[order.argsort()]
        if self.pooling in ("attention", "gated"):
            return self.attend(embedded)
        return self.classify(embedded).log_softmax(1)[:, positive]

    def _pooled(self, embedded: Tensor, bag: Tensor) -> Tensor:
        """Return (bags, width) of embeddings (rows, width)."""
        bags = int(bag.max()) + 1 if len(bag) else 0
        empty = embedded.new_zeros(bags, embedded.shape[1])
        if self.pooling == "max":
            rows = bag[:, None].expand_as(embedded)
            return empty.scatter_reduce(0, rows, embedded, "amax", include_self=False)
        weights = torch.ones_like(embedded[:, 0])
        if self.pooling != "mean":
            scores = self.attend(embedded)
            highest = scores.new_zeros(bags).scatter_reduce(
                0, bag, scores, "amax", include_self=False
            )
            weights = (scores - highest.detach()[bag]).exp()
        totals = weights.new_zeros(bags).index_add(0, bag, weights)
        return empty.index_add(0, bag, embedded * (weights / totals[bag])[:, None])


class Attention(nn.Sequential):
    """A score for each embedding: w · tanh(V h), gated w · (tanh(V h) ⊙ σ(U h)).

    Args:
        width: Of the embeddings.
        gated: Whether it has a gate.
    """

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.gate = nn.Sequential(nn.Linear(width, HIDDEN), nn.Sigmoid()) if gated else None

    def forward(self, input: Tensor) -> Tensor:
        """Return (rows,) of embeddings (rows, width)."""
        hidden = self[1](self[0](input))
        return self[2](hidden if self.gate is None else hidden * self.gate(input))[:, 0]


def _apart(embedded: Tensor, bag: Tensor) -> list[Tensor]:
    """Return the rows of each bag."""
    return [embedded[bag == number] for number in range(int(bag.max()) + 1)] if len(bag) else []


def _torchmil() -> Any:
    try:
        from torchmil.models import TransMIL
    except ImportError as error:
        raise BadInput(
            "`head: transmil` is torchmil's: pip install 'greenvis[bags]', or take head: gated"
        ) from error
    return TransMIL
