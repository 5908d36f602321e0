"""Metrics of own tasks, as torchmetrics has them; imported late, for that takes seconds.

What is summed over batches is summed over processes alike. In double precision: torchmetrics's own
divide in single. A batch whose logits all happen to lie between 0 and 1 is taken for probabilities
by torchmetrics, so that probabilities are what it gets.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
    MultilabelAveragePrecision,
)
from torchmetrics.utilities.data import dim_zero_cat

from greenvis.tasks.answers import UNKNOWN


class Accuracy(MulticlassStatScores):
    """Top-1 accuracy over what is known, 0 to 1.

    Args:
        classes: How many answers there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(
            num_classes=max(classes, 2), average="micro", ignore_index=UNKNOWN, validate_args=False
        )

    def compute(self) -> Tensor:
        """Return the share of right answers; 0 of none."""
        right, _, _, _, known = super().compute().double()
        return right / known.clamp(min=1)


class PixelAccuracy(Accuracy):
    """The same for logits (batch, classes, …) of any number of axes."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add answers (batch, classes, …) and labels (batch, …)."""
        super().update(preds.argmax(1), target)


class LabelPrecision(MultilabelAveragePrecision):
    """Mean average precision over the classes that an image of the test has, 0 to 1; labels of -1
    are left out.

    Args:
        classes: How many answers there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(
            num_labels=max(classes, 2), average=None, ignore_index=UNKNOWN, validate_args=False
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, classes) and labels of 0, 1 and -1 alike."""
        super().update(preds.double().sigmoid(), target.round().long())

    def compute(self) -> Tensor:
        """Return the mean; 0 where no class occurs."""
        if not self.target:
            return torch.zeros(())
        occurs = (dim_zero_cat(self.target) == 1).flatten(0, -2).any(0)
        with warnings.catch_warnings():  # of classes that do not occur
            warnings.simplefilter("ignore")
            return _mean(super().compute(), occurs)


class NumberError(MeanAbsoluteError):
    """The root mean squared error, or the mean absolute one, over numbers that are known.

    Args:
        squared: Which of the two.
    """

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.squared = squared
        self.add_state("sum_abs_error", torch.zeros((), dtype=torch.float64), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add numbers (batch, numbers) and labels alike, NaN where not known."""
        known = ~target.isnan()
        errors = (preds[known].double() - target[known].double()).abs()
        self.sum_abs_error += (errors.square() if self.squared else errors).sum()
        self.total += known.sum()

    def compute(self) -> Tensor:
        """Return the error, in the unit of the numbers."""
        mean = self.sum_abs_error / self.total.clamp(min=1)
        return mean.sqrt() if self.squared else mean


class MeanIoU(MulticlassConfusionMatrix):
    """Intersection over union, a mean over the classes that masks or answers have, 0 to 1.

    Args:
        classes: How many answers there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=max(classes, 2), ignore_index=UNKNOWN, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, classes, height, width) and masks (batch, height, width)."""
        super().update(preds.argmax(1), target)

    def compute(self) -> Tensor:
        """Return the mean over all pixels added."""
        counts = self.confmat.double()
        both = counts.diag()
        either = counts.sum(0) + counts.sum(1) - both
        return _mean(both / either.clamp(min=1), either > 0)


class BoundaryIoU(Metric):
    """Intersection over union of what of each class lies near its own border (Cheng et al., 2021),
    a mean over classes, 0 to 1.

    The border of the image is one, as in the paper. Pixels that are not known count nowhere.

    Args:
        classes: How many answers there are.
        band: How far from the border, as a share of the diagonal; at least a pixel.
    """

    def __init__(self, classes: int, band: float) -> None:
        super().__init__()
        self.band = band
        for name in ("both", "either"):
            self.add_state(name, torch.zeros(classes, dtype=torch.float64), "sum")
        self.both: Tensor
        self.either: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, classes, height, width) and masks (batch, height, width)."""
        answers, known = preds.argmax(1), (target != UNKNOWN)[:, None]
        size = max(1, round(self.band * math.hypot(*target.shape[1:])))
        classes = torch.arange(len(self.both), device=target.device)[None, :, None, None]
        ours, theirs = (near_border(m[:, None] == classes, size) for m in (answers, target))
        axes = (0, 2, 3)
        self.both += (ours & theirs & known).sum(axes)
        self.either += ((ours | theirs) & known).sum(axes)

    def compute(self) -> Tensor:
        """Return the mean over the classes that masks or answers have."""
        return _mean(self.both / self.either.clamp(min=1), self.either > 0)


def near_border(masks: Tensor, size: int) -> Tensor:
    """Return what of masks is no more than `size` pixels from where they end.

    Args:
        masks: bool (…, height, width).
        size: Pixels, at least 1.

    Returns:
        bool, of the same shape.
    """
    outside = F.pad((~masks).float(), (size, size, size, size), value=1.0)
    inner = F.max_pool2d(outside.flatten(0, -3)[:, None], 2 * size + 1, 1) == 0
    return masks & ~inner.view(masks.shape)


class BagAuc(MulticlassAUROC):
    """Area under the ROC curve, each class against the rest, a mean over classes that some samples
    have and some have not, 0 to 1.

    Args:
        classes: How many answers there are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(
            num_classes=max(classes, 2), average=None, ignore_index=UNKNOWN, validate_args=False
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, classes) and class numbers (batch,)."""
        super().update(preds.double().softmax(1), target)

    def compute(self) -> Tensor:
        """Return the mean; 0 where no class is told from another."""
        if not self.target:
            return torch.zeros(())
        target = dim_zero_cat(self.target)
        target = target[target != UNKNOWN]
        counts = torch.bincount(target, minlength=self.num_classes)
        return _mean(super().compute(), (counts > 0) & (counts < len(target)))


class ExactMatch(Metric):
    """Share of answers that are right in every token, 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "known"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")
        self.right: Tensor
        self.known: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (batch, steps, vocabulary) and answers (batch, tokens), -1 behind their
        end."""
        tokens = preds.argmax(-1)[:, : target.shape[1]]
        tokens = F.pad(tokens, (0, target.shape[1] - tokens.shape[1]), value=UNKNOWN - 1)
        known = (target != UNKNOWN).any(1)
        right = ((tokens == target) | (target == UNKNOWN)).all(1)
        self.right += (right & known).sum()
        self.known += known.sum()

    def compute(self) -> Tensor:
        """Return the share; 0 of none."""
        return self.right / self.known.clamp(min=1)


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """Return the mean of some values, 0 of none."""
    picked = torch.where(among, values.double(), 0.0)
    return picked.sum() / among.sum().clamp(min=1)
