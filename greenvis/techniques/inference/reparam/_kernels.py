"""Kernels that equal branches of a convolution (RepVGG: Ding et al., 2021; DBB: Ding et al.,
2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_norm(kernel: Tensor, norm: Any, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return kernel and bias that equal a convolution with a batch norm behind it, in eval (RepVGG,
    eq. 3): K' = K·t, b' = β + (b - μ)·t, t = γ / √(σ² + ε).

    Args:
        kernel: (out, in / groups, *sides).
        norm: The batch norm.
        bias: (out,), the convolution's own.

    Returns:
        The kernel, of its shape, and the bias (out,).
    """
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale if norm.bias is None else norm.bias + shift * scale
    return kernel * scale.view(-1, *[1] * (kernel.dim() - 1)), shift


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


def identity(channels: int, groups: int, sides: Sequence[int], like: Tensor) -> Tensor:
    """Return the kernel of a convolution that gives its input back.

    Args:
        channels: In and out.
        groups: Of the convolution.
        sides: Of the kernel.
        like: A tensor of the wanted type, on the wanted device.

    Returns:
        (channels, channels / groups, *sides).
    """
    width = channels // groups
    kernel = like.new_zeros(channels, width, *[1] * len(sides))
    rows = torch.arange(channels, device=like.device)
    kernel[rows, rows % width] = 1
    return centred(kernel, sides)


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
