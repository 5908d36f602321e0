"""Scikit-learn's digits as several benchmarks train on them, and networks for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis import models

TRAIN, TEST = 500, 450


@functools.cache
def digits(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits in three channels, float32 (n, 3, side, side) and int64 (n,):
    those to train on, and those to test on."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:TRAIN], y[:TRAIN], x[-TEST:], y[-TEST:]


def built(options: dict[str, Any], seed: int) -> nn.Module:
    """Return a model for ten classes."""
    torch.manual_seed(seed)
    ref, rest = options["ref"], {k: v for k, v in options.items() if k != "ref"}
    return models.build(ref, num_classes=10, **rest)
