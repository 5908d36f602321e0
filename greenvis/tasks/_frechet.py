"""The Fréchet distance of features, from sums over images that batches and processes add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.tasks._rows import RowMetric, joined
from greenvis.tasks.answers import UNKNOWN

if TYPE_CHECKING:
    from greenvis.tasks.generation import Drawn

SIDE, WIDTH = 8, 64


def features_of(images: Tensor, kind: str) -> Tensor:
    """Return what images are compared by, float64 (n, features).

    Args:
        images: (n, channels, height, width).
        kind: "pixels": means of 8×8 areas. "random": of a network of two convolutions whose weights
            are fixed, means over positions.
    """
    x = images.float()
    if kind == "pixels":
        size = (min(SIDE, x.shape[2]), min(SIDE, x.shape[3]))
        return F.adaptive_avg_pool2d(x, size).flatten(1).double()
    generator = torch.Generator().manual_seed(0)

    def weight(outputs: int, inputs: int) -> Tensor:
        drawn = torch.randn(outputs, inputs, 3, 3, generator=generator)
        return (drawn * (2 / (9 * inputs)) ** 0.5).to(x.device)

    hidden = F.conv2d(x, weight(WIDTH // 2, x.shape[1]), padding=1).relu()
    return (
        F.conv2d(hidden, weight(WIDTH, WIDTH // 2), padding=1, stride=2)
        .relu()
        .mean((2, 3))
        .double()
    )


def halves(images: Tensor) -> Tensor:
    """Say which half each image is of, by its values alone: the same in any order and batch.

    Returns:
        bool (n,).
    """
    sums = images.double().flatten(1).sum(1)
    return (sums.abs() * 4096).floor().remainder(2) == 1


def distance(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    """Return the Fréchet distance of two sets of features (Heusel et al., 2017, eq. 6).

    Args:
        one: Count, sum (d,) and sum of outer products (d, d), float64.
        other: The same.

    Returns:
        A scalar; 0 is the least.
    """
    (mean, cov), (mean_other, cov_other) = (_moments(*sums) for sums in (one, other))
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_other @ root).clamp(min=0).sqrt().sum()
    return (mean - mean_other).square().sum() + cov.trace() + cov_other.trace() - 2 * cross


def _moments(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    n = count.clamp(min=2)
    mean = total / n
    return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)


class Frechet(RowMetric):
    """Fréchet distance of what was drawn for one half of the real images' labels to the other half.

    Args:
        features: As `features_of`.
        floor: That of the two halves of real images instead.
    """

    def __init__(self, features: str, floor: bool = False) -> None:
        super().__init__()
        self.features, self.floor = features, floor
        for half in ("one", "other"):
            self.add_state(f"{half}_count", torch.zeros((), dtype=torch.float64), "sum")
            # one row each, a sum: how many features there are is not known before
            self.add_rows(f"{half}_total", dims=2, dtype=torch.float64)
            self.add_rows(f"{half}_outer", dims=3, dtype=torch.float64)

    def update(self, preds: Drawn, target: Tensor) -> None:
        """Add images drawn beside real ones."""
        first = halves(preds.real)
        one = (preds.real if self.floor else preds.images)[first]
        self._add("one", features_of(one, self.features))
        self._add("other", features_of(preds.real[~first], self.features))

    def _add(self, half: str, features: Tensor) -> None:
        setattr(self, f"{half}_count", getattr(self, f"{half}_count") + len(features))
        for part, value in (("total", features.sum(0)), ("outer", features.T @ features)):
            rows = getattr(self, f"{half}_{part}")
            rows[:] = [sum(rows, value[None])]

    def compute(self) -> Tensor:
        """Return the distance; infinite of fewer than two images in a half."""
        counts = [getattr(self, f"{half}_count") for half in ("one", "other")]
        if min(map(float, counts)) < 2:
            return torch.tensor(float("inf"))
        one, other = (
            (count, *(joined(getattr(self, f"{half}_{p}")).sum(0) for p in ("total", "outer")))
            for half, count in zip(("one", "other"), counts, strict=True)
        )
        return distance(one, other)


class ClassEntropy(RowMetric):
    """Entropy, in bits, of the classes whose real images' mean what was drawn is nearest to: that
    of the labels where each class is drawn as often as it is asked for.

    Args:
        features: As `features_of`.
    """

    def __init__(self, features: str) -> None:
        super().__init__()
        self.features = features
        self.add_rows("drawn", dims=2, dtype=torch.float64)
        self.add_rows("real", dims=2, dtype=torch.float64)
        self.add_rows("labels", dtype=torch.int64)
        self.drawn: list[Tensor]
        self.real: list[Tensor]
        self.labels: list[Tensor]

    def update(self, preds: Drawn, target: Tensor) -> None:
        """Add images drawn beside real ones of classes (batch,)."""
        known = target != UNKNOWN
        self.drawn.append(features_of(preds.images, self.features))
        self.real.append(features_of(preds.real[known], self.features))
        self.labels.append(target[known])

    def compute(self) -> Tensor:
        """Return the entropy; 0 of none."""
        labels = joined(self.labels) if len(self.labels) else torch.zeros(0)
        if not len(labels):
            return torch.zeros(())
        classes, own = labels.unique(return_inverse=True)
        real = joined(self.real)
        means = real.new_zeros(len(classes), real.shape[1]).index_add(0, own, real)
        means = means / torch.bincount(own, minlength=len(classes))[:, None]
        nearest = torch.cdist(joined(self.drawn), means).argmin(1)
        shares = torch.bincount(nearest, minlength=len(classes)).double() / len(nearest)
        return -(shares * shares.clamp(min=1e-300).log2()).sum()
