"""What a batch without labels teaches: entropies, and which images they are of. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.techniques._shared.entropy import entropy

_MEMORY = 0.9  # share of a running mean that a batch leaves


def limit(logits: Tensor, share: float) -> float:
    """Return E0, the entropy from which on an answer is not relied on: a share of ln(classes)."""
    return share * math.log(logits.shape[-1])


def eata_weights(
    logits: Tensor, mean: Tensor | None, share: float, redundant: float
) -> tuple[Tensor, Tensor | None]:
    """Return what each image counts in EATA's loss (Niu et al., 2022, equations 3 to 6).

    exp(E0 - H) where the entropy H is below E0 and the answer is unlike the mean of those taken
    before (|cosine| below `redundant`), else 0.

    Args:
        logits: (batch, classes).
        mean: Running mean of the probabilities of images taken before, (classes,); None at first.
        share: E0 in units of ln(classes).
        redundant: The cosine from which on an answer is nothing new.

    Returns:
        Weights (batch,) without a gradient, and the running mean with this batch's images in it.
    """
    unsure, e0 = entropy(logits).detach(), limit(logits, share)
    probabilities = logits.detach().float().softmax(-1)
    taken = unsure < e0
    if mean is not None:
        taken = taken & (F.cosine_similarity(probabilities, mean[None], dim=1).abs() < redundant)
    if taken.any():
        new = probabilities[taken].mean(0)
        mean = new if mean is None else _MEMORY * mean + (1 - _MEMORY) * new
    return torch.where(taken, (e0 - unsure).exp(), torch.zeros_like(unsure)), mean


def weighted_entropy(logits: Tensor, weights: Tensor) -> Tensor | None:
    """Return the mean of weight · entropy over the images that count; None where none does."""
    taken = weights > 0
    if not taken.any():
        return None
    return (weights[taken] * entropy(logits[taken])).mean()


def anchor(
    parameters: Sequence[Tensor], source: Sequence[Tensor], fisher: Sequence[Tensor]
) -> Tensor:
    """Return how far parameters went from the source's, by importance: Σ F · (θ - θ0)² (EATA,
    equation 8), a scalar."""
    terms = [
        (f * (p - s).square()).sum() for p, s, f in zip(parameters, source, fisher, strict=True)
    ]
    return torch.stack(terms).sum()


def running(mean: float | None, value: float) -> float:
    """Return a running mean with one more value in it."""
    return value if mean is None else _MEMORY * mean + (1 - _MEMORY) * value
