"""How much an unlabelled image's answer is believed: FixMatch's threshold, those of FreeMatch that
grow with what the model learns, SoftMatch's weights, and UDA's sharpened answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12
_WIDTHS = 2  # SoftMatch: a confidence lies within so many deviations of the mean (n_sigma)

Schedule = Literal["linear", "log", "exp"]


def sure(probabilities: Tensor, threshold: float | Tensor) -> Tensor:
    """Return 1 where the likeliest class is at least so likely, else 0 (FixMatch: Sohn et al.,
    2020, equation 4), (batch,).

    Args:
        probabilities: (batch, classes).
        threshold: A number, or one of each class, (classes,).
    """
    sureness, classes = probabilities.max(1)
    least = threshold[classes] if isinstance(threshold, Tensor) else threshold
    return (sureness >= least).to(probabilities.dtype)


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Return probabilities (batch, classes), the nearer to one class the lower the temperature
    (UDA: Xie et al., 2020, section 2.2)."""
    return (logits / temperature).softmax(1)


def divergences(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target ‖ softmax(logits)) of each image, (batch,), of (batch, classes)."""
    return F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)


def annealed(progress: float, classes: int, schedule: Schedule) -> float:
    """Return the probability above which a labelled image is no longer learned from (training
    signal annealing: Xie et al., 2020): from 1 / classes to 1.

    Args:
        progress: Share of the training that is over.
        classes: How many there are.
        schedule: "exp" rises late, for few labels; "log" early, for many.
    """
    share = {
        "linear": progress,
        "log": 1 - math.exp(-5 * progress),
        "exp": math.exp(5 * (progress - 1)),
    }[schedule]
    return share * (1 - 1 / classes) + 1 / classes


class Moving:
    """Running means by name, each of which begins at a value of its own.

    Args:
        momentum: Share of a mean that an update leaves.
        device: Of the means.
        values: What they begin with.
    """

    def __init__(self, momentum: float, device: torch.device, values: Mapping[str, Tensor]) -> None:
        self.momentum = momentum
        self.values = {name: value.float().to(device, copy=True) for name, value in values.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def update(self, **now: Tensor) -> None:
        """Take values of a step into the means."""
        for name, value in now.items():
            self.values[name].lerp_(value.detach().float(), 1 - self.momentum)


class FreeMatch(Moving):
    """Thresholds that rise with what the model has learned, of each class (FreeMatch: Wang et al.,
    2023, equations 5 to 11)."""

    def __init__(self, classes: int, momentum: float, device: torch.device) -> None:
        even = torch.full((classes,), 1 / classes)
        begin = {"threshold": even[0], "mean": even, "histogram": even}
        super().__init__(momentum, device, begin)

    def observe(self, probabilities: Tensor) -> None:
        """Take the answers to weak views (batch, classes) into the means."""
        sureness, classes = probabilities.max(1)
        counts = torch.bincount(classes, minlength=probabilities.shape[1])
        histogram = counts / len(probabilities)
        self.update(threshold=sureness.mean(), mean=probabilities.mean(0), histogram=histogram)

    def thresholds(self) -> Tensor:
        """Return that of each class, (classes,): the common one, times how often a class is
        answered for the one that is most."""
        return self["mean"] / self["mean"].max() * self["threshold"]

    def weights(self, probabilities: Tensor) -> Tensor:
        """Return 1 for images above their class's threshold, else 0, (batch,)."""
        return sure(probabilities, self.thresholds())

    def fairness(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Return the term that keeps answers from being of few classes, -H(a, b) (equation 11).

        Both are probabilities over histogram, brought to a sum of 1: a of the weak views so far, b
        of these strong views.

        Args:
            logits: Of strong views, (batch, classes).
            weights: Which of them count, (batch,).
        """
        chosen = logits[weights > 0].softmax(1)
        if not len(chosen):
            return 0.0 * logits.sum()
        counts = torch.bincount(chosen.argmax(1), minlength=logits.shape[1])
        before = _even_out(self["mean"], self["histogram"])
        now = _even_out(chosen.mean(0), counts / len(chosen))
        return (before * (now + _TINY).log()).sum()


def _even_out(mean: Tensor, histogram: Tensor) -> Tensor:
    """Return mean / histogram with a sum of 1; 0 for a class that was not answered."""
    ratio = torch.where(histogram > 0, mean / histogram.clamp(min=_TINY), 0.0)
    return ratio / ratio.sum()


class SoftMatch(Moving):
    """Weights that fall with the distance below the mean confidence (SoftMatch: Chen et al., 2023,
    equations 5 to 9), of answers aligned to even classes."""

    def __init__(self, classes: int, momentum: float, device: torch.device) -> None:
        even = torch.full((classes,), 1 / classes)
        begin = {"mean": even[0], "variance": torch.ones(()), "answers": even}
        super().__init__(momentum, device, begin)

    def aligned(self, probabilities: Tensor) -> Tensor:
        """Return probabilities over their mean so far, each image's with a sum of 1."""
        ratio = probabilities / self["answers"].clamp(min=_TINY)
        return ratio / ratio.sum(1, keepdim=True)

    def observe(self, probabilities: Tensor) -> None:
        """Take the answers to weak views (batch, classes) into the means; the variance is the
        unbiased one."""
        self.update(answers=probabilities.mean(0))
        sureness = self.aligned(probabilities).max(1).values
        variance = sureness.var() if len(sureness) > 1 else torch.zeros_like(sureness[0])
        self.update(mean=sureness.mean(), variance=variance)

    def weights(self, probabilities: Tensor) -> Tensor:
        """Return exp(-min(p - mean, 0)² / (2 variance / 4)) of each image, (batch,)."""
        below = (self.aligned(probabilities).max(1).values - self["mean"]).clamp(max=0)
        return (-below.square() / (2 * self["variance"] / _WIDTHS**2).clamp(min=_TINY)).exp()
