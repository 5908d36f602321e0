"""Which labels are right by their losses: a mixture of two Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS, _ENOUGH, _FLOOR = 10, 1e-2, 5e-4  # of EM: most steps, least gain, added to variances


def clean_probability(losses: Tensor) -> Tensor:
    """Return the probability of each label's being right (DivideMix: Li et al., 2020, section 3.1):
    of the lower of two Gaussians fitted to the losses, brought to 0 to 1.

    EM begins with means at 0 and 1, alike weights, and deviations of a tenth.

    Args:
        losses: (images,).

    Returns:
        float64 (images,); 1 where all losses are the same.
    """
    x = losses.double()
    span = x.max() - x.min()
    if not span > 0:
        return torch.ones_like(x)
    x = (x - x.min()) / span
    means, variances, weights = (
        x.new_tensor([0.0, 1.0]),
        x.new_tensor([0.01, 0.01]),
        x.new_full((2,), 0.5),
    )
    before = -torch.inf
    for _ in range(_STEPS):
        logs = _log_joint(x, means, variances, weights)
        bound = logs.logsumexp(1).mean().item()
        shares = logs.softmax(1)
        counts = shares.sum(0) + 10 * torch.finfo(x.dtype).eps
        means = (shares * x[:, None]).sum(0) / counts
        variances = (shares * (x[:, None] - means).square()).sum(0) / counts + _FLOOR
        weights = counts / counts.sum()
        if abs(bound - before) < _ENOUGH:
            break
        before = bound
    return _log_joint(x, means, variances, weights).softmax(1)[:, int(means.argmin())]


def _log_joint(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Return log(weight · density) of each Gaussian, (images, 2)."""
    distance = (x[:, None] - means).square() / variances
    return weights.log() - 0.5 * (distance + (2 * torch.pi * variances).log())
