"""Class-balanced sampling: rare classes are shown more often, frequent ones less."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput


def shares(counts: Tensor, power: float) -> Tensor:
    """Return how much of an epoch each class gets: n^power over its sum (Kang et al., 2020,
    equation 1).

    Args:
        counts: images of each class, (classes,); a class without any gets nothing.
        power: 1 as the images are, 0.5 by the square root, 0 all alike.

    Returns:
        float64 (classes,), which add up to 1.
    """
    weights = torch.where(counts > 0, counts.double().clamp(min=1) ** power, 0.0)
    return weights / weights.sum()


def quotas(portions: Tensor, total: int) -> Tensor:
    """Return whole numbers that add up to `total`, nearest to its portions (largest remainder)."""
    exact = portions * total
    out = exact.floor().long()
    missing = total - int(out.sum())
    out[(exact - out).argsort(descending=True, stable=True)[:missing]] += 1
    return out


def visits(labels: Tensor, power: float, generator: torch.Generator) -> Tensor:
    """Return the positions an epoch shows, as many as there are known labels: of each class its
    quota, no image a second time before every other of its class was shown.

    Args:
        labels: int64 (images,), -1 where one is not known; such an image is not shown.
        power: See `shares`.
        generator: Of the order.
    """
    known = int((labels >= 0).sum())
    counts = torch.bincount(labels[labels >= 0])
    out = []
    for label, quota in enumerate(quotas(shares(counts, power), known).tolist()):
        rows = (labels == label).nonzero().squeeze(1)
        rounds = [
            rows[torch.randperm(len(rows), generator=generator)]
            for _ in range(-(-quota // max(len(rows), 1)))
        ]
        out.append(torch.cat(rounds)[:quota] if rounds else rows[:0])
    chosen = torch.cat(out)
    return chosen[torch.randperm(len(chosen), generator=generator)]


class Balance(Technique):
    """Show the images of rare classes more often (class-balanced and square-root sampling: Kang et
    al., 2020).

    Costs nothing: an epoch has as many images as before. Rare classes gain, frequent ones lose, and
    overall accuracy on a test as long-tailed as the training falls: read accuracy by class, or test
    on balanced data. Images of rare classes are seen many times an epoch, so augment them. Only
    images whose label is known are shown. In a loop of your own ask `live.visit(epoch, images)`
    before each epoch.

    Example:
        >>> live = gv.wrap(model, gv.Balance())
        >>> images = torch.utils.data.TensorDataset(x)
        >>> images.targets = torch.tensor([0, 0, 0, 1])
        >>> positions = live.visit(0, images)
        >>> images.targets[positions].sum()  # half of them are of the rare class
        tensor(2)
    """

    name = "balance"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it counts images by their one class: leave it out"
    examples: ClassVar = ({}, {"power": 0.5})

    power: float = Field(
        default=0.0, ge=0, le=1, description="0: classes alike; 0.5: by the square root of counts"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledBalance(self)


class InstalledBalance(Installed):
    """Balanced epochs."""

    def __init__(self, request: Balance) -> None:
        super().__init__()
        self.request = request

    def visit(self, epoch: int, images: Any) -> Tensor:
        """Return the epoch's positions: a function of seed, epoch and labels."""
        labels = torch.as_tensor(images.targets)
        if labels.dim() != 1 or labels.is_floating_point() or not (labels >= 0).any():
            raise BadInput("balance counts images by class: labels int64 (images,), some known")
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return visits(labels, self.request.power, generator)
