"""Which neurons of a multi-layer perceptron belong together: clusters of equal size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced(points: Tensor, groups: int, rounds: int = 10, seed: int = 0) -> Tensor:
    """Return groups of equal size by k-means on the unit sphere, each point in the nearest group
    that has room; those it matters most to come first.

    Args:
        points: (n, dim), n a multiple of `groups`.
        groups: How many.
        rounds: Of k-means.
        seed: Of the first centres.

    Returns:
        int64 (n,), the group of each point.
    """
    points = F.normalize(points.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:groups].to(points.device)]
    labels = _fill(torch.cdist(points, centres))
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        renewed = _fill(torch.cdist(points, F.normalize(sums, dim=1)))
        if torch.equal(renewed, labels):
            break
        labels = renewed
    return labels


def _fill(distances: Tensor) -> Tensor:
    """Return a group per point: points ask for their nearest group with room, which takes the
    nearest of them."""
    size = len(distances) // distances.shape[1]
    labels = torch.full((len(distances),), -1, device=distances.device)
    open_ = distances.clone()
    while (rest := (labels < 0).nonzero().squeeze(1)).numel():
        wishes = open_[rest].argmin(1)
        for group in wishes.unique().tolist():
            room = size - int((labels == group).sum())
            asking = rest[wishes == group]
            labels[asking[open_[asking, group].argsort()[:room]]] = group
            if len(asking) >= room:
                open_[:, group] = torch.inf
    return labels
