"""The small networks that adapters add: every one ends in a zero-initialised projection, so a fresh
one gives zero.

Only that last projection starts at zero: were the first one zero too, no gradient would ever reach
either.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.errors import GreenvisError


class Bottleneck(nn.Module):
    """scale · up(act(down(x))): x (…, channels), or with the channels on axis `axis`; the output
    has x's shape."""

    def __init__(
        self,
        channels: int,
        width: int,
        act: nn.Module,
        *,
        axis: int,
        scale: float,
        dropout: float,
        **kind: Any,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, **kind)
        self.act = act
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Linear(width, channels, **kind))
        self.axis, self.scale = axis, scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the change to add, of x's shape."""
        hidden = self.dropout(self.act(self.down(x.movedim(self.axis, -1))))
        return self.scale * self.up(hidden).movedim(-1, self.axis)


class ConvBottleneck(nn.Module):
    """scale · up(act(depthwise(down(x)))) with pointwise `down` and `up`: x (batch, channels,
    height, width)."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        kernel_size: int,
        scale: float,
        dropout: float,
        **kind: Any,
    ) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, width, 1, **kind)
        self.depthwise = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, **kind
        )
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Conv2d(width, channels, 1, **kind))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the change to add, of x's shape."""
        return self.scale * self.up(self.dropout(self.act(self.depthwise(self.down(x)))))


class Mona(nn.Module):
    """The multi-cognitive visual filters of Yin et al. (2025, section 3.3): x (batch, channels,
    height, width).

    Scaled layer norm s1·LN(x) + s2·x, down, the mean of 3×3, 5×5 and 7×7 depthwise filters and a
    pointwise one, each with a skip, GeLU, up.
    """

    def __init__(
        self, channels: int, width: int, *, scale: float, dropout: float, **kind: Any
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, **kind)
        self.s1 = nn.Parameter(self.norm.weight.detach().clone() * 1e-6)
        self.s2 = nn.Parameter(self.norm.weight.detach().clone())
        self.down = nn.Conv2d(channels, width, 1, **kind)
        self.filters = nn.ModuleList(
            nn.Conv2d(width, width, k, padding=k // 2, groups=width, **kind) for k in (3, 5, 7)
        )
        self.mix = nn.Conv2d(width, width, 1, **kind)
        self.dropout = nn.Dropout(dropout)
        self.up = zeroed(nn.Conv2d(width, channels, 1, **kind))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the change to add, of x's shape."""
        x = x.movedim(1, -1)
        x = self.down((self.s1 * self.norm(x) + self.s2 * x).movedim(-1, 1))
        x = x + sum(f(x) for f in self.filters) / len(self.filters)
        x = x + self.mix(x)
        return self.scale * self.up(self.dropout(F.gelu(x)))


class Grid:
    """Turns tokens (batch, prefix + height·width, channels) and maps of either order into maps with
    the channels first.

    The images' aspect ratio, seen on their way into the model, tells height from width.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.height, self.width = shape[-2:]

    def watch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the size of the images (batch, channels, height, width): a pre-hook of the whole
        model."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 4:
                self.height, self.width = value.shape[-2:]
                return

    def size(self, patches: int) -> tuple[int, int] | None:
        """Return (rows, columns) of so many patches, or None where they fill no grid of the images'
        aspect ratio."""
        rows = max(1, round(math.sqrt(patches * self.height / self.width)))
        return (rows, patches // rows) if patches > 0 and patches % rows == 0 else None

    def split(self, x: Tensor, axis: int, prefix: int) -> Tensor:
        """Return the map (batch, channels, height, width) in a part's output; prefix tokens are
        left out."""
        if x.dim() == 4:
            return x if axis == 1 else x.movedim(-1, 1)
        size = self.size(x.shape[1] - prefix)
        if size is None:
            raise GreenvisError(
                f"{x.shape[1]} tokens with {prefix} prefix tokens fill no grid on images "
                f"{self.height} × {self.width}"
            )
        return x[:, prefix:].transpose(1, 2).unflatten(2, size)

    def add(self, x: Tensor, change: Tensor, axis: int, prefix: int) -> Tensor:
        """Return a part's output with a change of its map added; prefix tokens stay as they are."""
        if x.dim() == 4:
            return x + (change if axis == 1 else change.movedim(1, -1))
        return x + F.pad(change.flatten(2).transpose(1, 2), (0, 0, prefix, 0))


def zeroed(layer: nn.Linear | nn.Conv2d) -> Any:
    """Return the layer with weight and bias at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
