"""Metrics of clusters that are matched with classes (LUSS: Gao et al., 2022); imported late."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from greenvis.tasks._metrics import near_border
from greenvis.tasks.answers import UNKNOWN

_BETA2 = 0.3


def matched(shared: Tensor) -> Tensor:
    """Return the class of each cluster, so that they share the most images, one class each.

    Args:
        shared: images in which cluster i and class j occur, (clusters, classes), the background in
            neither.

    Returns:
        int64 (clusters,), from 0; a square matrix matches all.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(shared.cpu().numpy(), maximize=True)
    out = torch.empty(len(rows), dtype=torch.int64)
    out[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return out


class _Matched(Metric):
    """Counts which clusters and classes occur in the same images."""

    shared: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = max(classes, 2)
        size = self.classes - 1
        self.add_state("shared", torch.zeros(size, size, dtype=torch.float64), "sum")

    def _occurs(self, answers: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Count the images; return how many pixels each cluster and each class has, (batch,
        classes) each."""
        known = target != UNKNOWN
        areas = []
        for labels in (answers, target):
            hot = F.one_hot(labels.clamp(min=0), self.classes) * known.unsqueeze(-1)
            areas.append(hot.flatten(1, 2).sum(1))
        ours, theirs = ((a[:, 1:] > 0).double() for a in areas)
        self.shared += ours.T @ theirs
        return areas[0], areas[1]

    def order(self) -> Tensor:
        """Return the class of each cluster with the background, which is itself: int64
        (classes,)."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), matched(self.shared) + 1])


class MatchedIoU(_Matched):
    """Intersection over union, a mean over all classes, 0 of one that occurs nowhere.

    Args:
        classes: How many answers there are, the background among them.
    """

    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        size = self.classes
        self.add_state("counts", torch.zeros(size, size, dtype=torch.float64), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs (batch, clusters, height, width) and masks (batch, height, width)."""
        answers = preds.argmax(1)
        self._occurs(answers, target)
        known = target != UNKNOWN
        pairs = answers[known] * self.classes + target[known]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.counts += counts.view(self.classes, self.classes)

    def compute(self) -> Tensor:
        """Return the mean, 0 to 1."""
        counts = torch.zeros_like(self.counts)
        counts[self.order().to(counts.device)] = self.counts
        both = counts.diag()
        return (both / (counts.sum(0) + counts.sum(1) - both).clamp(min=1)).mean()


class MatchedBoundary(_Matched):
    """The same of what of clusters and classes lies near their own borders (Cheng et al., 2021).

    Args:
        classes: How many answers there are, the background among them.
        band: How far from the border, as a share of the diagonal; at least a pixel.
    """

    both: Tensor
    ours: Tensor
    theirs: Tensor

    def __init__(self, classes: int, band: float) -> None:
        super().__init__(classes)
        self.band = band
        size = self.classes
        self.add_state("both", torch.zeros(size, size, dtype=torch.float64), "sum")
        for name in ("ours", "theirs"):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs (batch, clusters, height, width) and masks (batch, height, width)."""
        answers, known = preds.argmax(1), (target != UNKNOWN)[:, None]
        self._occurs(answers, target)
        size = max(1, round(self.band * math.hypot(*target.shape[1:])))
        classes = torch.arange(self.classes, device=target.device)[None, :, None, None]
        ours, theirs = (
            (near_border(m[:, None] == classes, size) & known).movedim(1, 0).flatten(1).double()
            for m in (answers, target)
        )
        self.both += ours @ theirs.T
        self.ours += ours.sum(1)
        self.theirs += theirs.sum(1)

    def compute(self) -> Tensor:
        """Return the mean, 0 to 1."""
        order = self.order().to(self.both.device)
        rows = torch.arange(self.classes, device=order.device)
        both = self.both[rows, order]
        return (both / (self.ours + self.theirs[order] - both).clamp(min=1)).mean()


class ImageAccuracy(_Matched):
    """Whether an image shows the class that fills most of what is answered as foreground.

    Args:
        classes: How many answers there are, the background among them.
    """

    right: Tensor
    images: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        size = self.classes - 1
        self.add_state("right", torch.zeros(size, size, dtype=torch.float64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs (batch, clusters, height, width) and masks (batch, height, width)."""
        ours, theirs = self._occurs(preds.argmax(1), target)
        first = F.one_hot(ours[:, 1:].argmax(1), self.classes - 1).double()
        first *= (ours[:, 1:].sum(1, keepdim=True) > 0).double()
        self.right += first.T @ (theirs[:, 1:] > 0).double()
        self.images += len(target)

    def compute(self) -> Tensor:
        """Return the share of images, 0 to 1."""
        rows = torch.arange(self.classes - 1)
        right = self.right.cpu()[rows, matched(self.shared)]
        return right.sum() / self.images.cpu().clamp(min=1)


class Foreground(Metric):
    """Fβ of the foreground, whatever its classes, β² = 0.3: a mean over images."""

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add outputs (batch, clusters, height, width) and masks (batch, height, width)."""
        known = target != UNKNOWN
        ours, theirs = ((m > 0) & known for m in (preds.argmax(1), target))
        both, answered, labelled = (
            m.flatten(1).sum(1).double() for m in (ours & theirs, ours, theirs)
        )
        precision, recall = both / answered.clamp(min=1), both / labelled.clamp(min=1)
        below = (_BETA2 * precision + recall).clamp(min=1e-20)
        self.total += ((1 + _BETA2) * precision * recall / below).sum()
        self.images += len(target)

    def compute(self) -> Tensor:
        """Return the mean, 0 to 1."""
        return self.total / self.images.clamp(min=1)
