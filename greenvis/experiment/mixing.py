"""Batches whose images are mixed in pairs, and the loss that knows both labels of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from greenvis.errors import BadInput


def blend(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Return share · x + (1 − share) · other (mixup: Zhang et al., 2018, equation 1)."""
    return share * x + (1 - share) * other


def paste(x: Tensor, other: Tensor, share: float, at: tuple[float, float]) -> tuple[Tensor, float]:
    """Return x with a rectangle of `other`, the same in all images (CutMix: Yun et al., 2019).

    Args:
        x, other: (batch, channels, height, width).
        share: of x that is to remain; what lies outside of the image takes nothing.
        at: centre of the rectangle, as shares of height and width.

    Returns:
        The images, and the share of x that does remain.
    """
    height, width = x.shape[-2:]
    half = 0.5 * math.sqrt(1 - share)
    top, bottom = (round(height * min(max(at[0] + d, 0.0), 1.0)) for d in (-half, half))
    left, right = (round(width * min(max(at[1] + d, 0.0), 1.0)) for d in (-half, half))
    out = x.clone()
    out[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (height * width)


class Mixing:
    """Mixes the images of a batch with those one row on, by one share for all; images whose label
    is not known stay as they are. Draws from torch's random state.

    Args:
        mixup: Of the Beta distribution (alpha, alpha) that shares are drawn from; None: never.
        cutmix: Likewise; each batch takes one of the two where both are given.
    """

    def __init__(self, mixup: float | None, cutmix: float | None) -> None:
        self._ways = [(paste_in, a) for paste_in, a in ((False, mixup), (True, cutmix)) if a]
        self._other: Tensor | None = None
        self._share = 1.0

    def batch(self, x: Any, y: Any) -> Any:
        """Return the images mixed; the loss of the next step is of both labels.

        Args:
            x: (batch, channels, height, width).
            y: Classes int64 (batch,), -1 where one is not known.

        Raises:
            BadInput: For other labels, or batches that are no images.
        """
        self._other = None
        if not self._ways:
            return x
        if not isinstance(x, Tensor) or x.dim() != 4 or not isinstance(y, Tensor) or y.dim() != 1:
            raise BadInput(
                "train.mixup and train.cutmix mix images of one class each: leave them out"
            )
        paste_in, alpha = self._ways[int(torch.randint(len(self._ways), ()))]
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        at = tuple(torch.rand(2).tolist())
        rows = (y >= 0).nonzero().squeeze(1)
        partner = torch.arange(len(y), device=y.device)
        partner[rows] = rows.roll(1)
        if paste_in:
            mixed, share = paste(x, x[partner], share, at)
        else:
            mixed = blend(x, x[partner], share)
        self._other, self._share = y[partner], share
        return torch.where((y >= 0)[:, None, None, None], mixed, x)

    def loss(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the task's loss of both labels, each by its share. Rows that techniques put behind
        the batch have one."""
        if not self._ways:
            return task_loss

        def mixed(outputs: Tensor, y: Tensor) -> Tensor:
            if self._other is None:
                return task_loss(outputs, y)
            other = torch.cat([self._other, y[len(self._other) :]])
            return self._share * task_loss(outputs, y) + (1 - self._share) * task_loss(
                outputs, other
            )

        return mixed
