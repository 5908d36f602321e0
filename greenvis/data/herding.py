"""Herding: the few of many whose mean stays nearest the mean of all."""

from __future__ import annotations

import torch
from torch import Tensor


def herding(features: Tensor, count: int) -> Tensor:
    """Choose the rows whose mean stays nearest the mean of all (Welling, 2009).

    Each brings the mean of those chosen nearest to the mean of all, so a list is cut from behind.
    iCaRL (Rebuffi et al., 2017, algorithm 4) gives it features of length 1.

    Args:
        features: (n, dim).
        count: Rows to choose, at most.

    Returns:
        Rows, int64 (at most count,), in the order chosen.
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    rows: list[int] = []
    for k in range(min(count, len(features))):
        distance = (
            ((total + features) / (k + 1) - mean).square().sum(1).masked_fill(~left, torch.inf)
        )
        rows.append(int(distance.argmin()))
        total, left[rows[-1]] = total + features[rows[-1]], False
    return torch.tensor(rows, dtype=torch.int64)
