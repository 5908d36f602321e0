"""The step to the worst weights nearby, which sharpness-aware techniques take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_TINY = 1e-12  # a gradient of zero leads nowhere


def ascent(
    gradients: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    rho: float,
    adaptive: bool = False,
) -> dict[str, Tensor]:
    """Return the step to the worst weights nearby, to first order (Foret et al., 2021, equation 2).

    rho · g / ‖g‖, with the norm over all weights together. Adaptive (Kwon et al., 2021, equation
    9): rho · w² · g / ‖w · g‖, so that weights may move in proportion to their size.

    Args:
        gradients: of the loss, by name.
        weights: of the same names and shapes.
        rho: length of the step; adaptive: in units of the weights.
        adaptive: whether sizes of the weights count.

    Returns:
        The step, by name.
    """
    scale = {n: weights[n].abs() if adaptive else torch.ones_like(g) for n, g in gradients.items()}
    norms = [(scale[n] * g).double().norm() for n, g in gradients.items()]
    length = torch.stack(norms).norm()
    factor = rho / (length + _TINY)
    return {n: scale[n].square() * g * factor.to(g.dtype) for n, g in gradients.items()}


def finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers are finite; the device is waited for once."""
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())
