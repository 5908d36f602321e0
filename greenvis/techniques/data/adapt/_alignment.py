"""How far two domains' features are apart, as losses. Pure functions of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.techniques._shared.entropy import entropy

_KERNELS = 5  # Gaussians, each twice as wide as the one before


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad_outputs[0], None


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, whose gradient is multiplied by -factor (Ganin and Lempitsky, 2015)."""
    return _Reversal.apply(x, factor)  # type: ignore[return-value]


def reversal_at(progress: float) -> float:
    """Return the factor of the reversed gradient, 2 / (1 + exp(-10 p)) - 1 (DANN, section 5).

    Args:
        progress: Of the training, 0 to 1.
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


def domain_loss(scores: Tensor, source: int, weights: Tensor | None = None) -> Tensor:
    """Return the cross entropy of telling the domains apart, half for each.

    Args:
        scores: (batch,), high for the source.
        source: How many of the first are of the source; the others are of the target.
        weights: What each counts within its domain, (batch,); alike where None.

    Returns:
        A scalar.
    """
    truth = (torch.arange(len(scores), device=scores.device) < source).to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, truth, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights
    means = [(w * part).sum() / w.sum() for w, part in (
        (weights[:source], losses[:source]), (weights[source:], losses[source:]))]  # fmt: skip
    return torch.stack(means).mean()


def surety(logits: Tensor) -> Tensor:
    """Return 1 + exp(-entropy) of each answer, (batch,): CDAN+E counts by it (Long et al., 2018,
    equation 7)."""
    return 1 + (-entropy(logits.detach())).exp()


def outer(features: Tensor, logits: Tensor, random: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return what CDAN's discriminator sees: features by class (equations 3 and 4).

    Args:
        features: (batch, dim).
        logits: (batch, classes); no gradient flows there.
        random: Matrices (dim, d) and (classes, d) of the randomised product; None: the product.

    Returns:
        (batch, classes · dim), or (batch, d).
    """
    shares = logits.detach().softmax(1).to(features.dtype)
    if random is None:
        return (shares[:, :, None] * features[:, None, :]).flatten(1)
    mixed, chosen = (features @ random[0]), (shares @ random[1])
    return mixed * chosen / math.sqrt(mixed.shape[1])


def mmd(source: Tensor, target: Tensor) -> Tensor:
    """Return the maximum mean discrepancy by five Gaussian kernels (Gretton et al., 2012; as in
    DAN: Long et al., 2015).

    Their widths are 1/4 to 4 times the mean squared distance of the pairs, without its gradient.

    Args:
        source: Features (n, dim).
        target: Features (m, dim).

    Returns:
        The biased estimate, a scalar.
    """
    both = torch.cat([source, target]).float()
    squares = both.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(0)
    count = len(both)
    width = distances.detach().sum() / (count * count - count)
    widths = [width.clamp_min(1e-12) * 2.0 ** (i - _KERNELS // 2) for i in range(_KERNELS)]
    kernel = torch.stack([(-distances / w).exp() for w in widths]).sum(0)
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance of the covariances over 4 · dim² (Sun and Saenko, 2016, equation
    1). Features (n, dim) and (m, dim), two or more of each."""
    gap = _covariance(source.float()) - _covariance(target.float())
    return gap.square().sum() / (4 * source.shape[1] ** 2)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)
