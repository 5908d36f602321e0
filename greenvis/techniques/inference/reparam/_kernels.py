"""Kernels that equal branches of a convolution (RepVGG: Ding et al., 2021; DBB: Ding et al.,
2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def centred(kernel: Tensor, sides: Sequence[int]) -> Tensor:
    """Return a kernel with zeros around it.

    Args:
        kernel: (out, in / groups, *smaller sides).
        sides: Of the larger kernel.

    Returns:
        (out, in / groups, *sides).
    """
    out = kernel.new_zeros(*kernel.shape[:2], *sides)
    starts = [(large - small) // 2 for large, small in zip(sides, kernel.shape[2:], strict=True)]
    where = [slice(s, s + k) for s, k in zip(starts, kernel.shape[2:], strict=True)]
    out[(slice(None), slice(None), *where)] = kernel
    return out


def average(mix: Tensor, sides: Sequence[int]) -> Tensor:
    """Return the kernel of a pointwise convolution with an average over `sides` behind it, zeros
    of the padding counted.

    Args:
        mix: (out, in / groups, 1, …).
        sides: Of the average.

    Returns:
        (out, in / groups, *sides).
    """
    return mix.expand(*mix.shape[:2], *sides) / math.prod(sides)


def serial(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return the kernel of a pointwise convolution with a k×k one behind it (DBB, eq. 7).

    Args:
        first: (middle, in / groups, 1, …), without a bias: one would have to stand in the padding
            between them, too.
        second: (out, middle / groups, *sides).
        groups: Of both.

    Returns:
        (out, in / groups, *sides).
    """
    # groups, out, middle, positions
    a = second.reshape(groups, -1, second.shape[1], math.prod(second.shape[2:]))
    b = first.flatten(1).unflatten(0, (groups, -1))  # groups, middle, in
    kernel = torch.einsum("gomp,gmi->goip", a, b)
    return kernel.reshape(second.shape[0], first.shape[1], *second.shape[2:])
