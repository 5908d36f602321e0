"""Losses of distillation on features: maps, vectors, relations. Pure functions of tensors.

A map is (batch, channels, height, width). Two maps of other sizes meet on the smaller grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_of(features: Tensor, count: int) -> Tensor:
    """Return the first `count` tokens before the patches as a map of one row, (batch, channels, 1,
    count), in float32."""
    return features[:, :count].mT.unsqueeze(2).float()


def beside(prefix: Tensor, patches: Tensor) -> Tensor:
    """Return the places of both maps in one row, the prefix first: (batch, channels, 1, count +
    height · width)."""
    return torch.cat([prefix, patches.flatten(2).unsqueeze(2)], 3)


def on_one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps on the smaller of their grids, by average pooling."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − cosine of the features at each place, averaged: the third of DistilBERT's losses
    (Sanh et al., 2019)."""
    student, teacher = on_one_grid(student, teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


def attention_map(features: Tensor, p: float = 2) -> Tensor:
    """Return where a map is active, (batch, places): mean over channels of |features|^p, of length
    1."""
    return F.normalize(features.abs().pow(p).mean(1).flatten(1))


def attention_transfer_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: float = 2
) -> Tensor:
    """Return the mean squared difference of attention maps, summed over pairs of layers (Zagoruyko
    & Komodakis, 2017).

    Channels may differ: only the places count.
    """
    pairs = [on_one_grid(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(
        [F.mse_loss(attention_map(s, p), attention_map(t, p)) for s, t in pairs]
    ).sum()


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two maps, whole and pooled to each level's grid
    (ReviewKD: Chen et al., 2021).

    Weights halve from level to level and sum to 1; levels not smaller than the map are left out.
    """
    student, teacher = on_one_grid(student, teacher)
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level < min(student.shape[2:]):
            weight /= 2
            weights += weight
            pooled_s, pooled_t = (F.adaptive_avg_pool2d(m, level) for m in (student, teacher))
            total = total + weight * F.mse_loss(pooled_s, pooled_t)
    return total / weights


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how the distances within a batch differ, each in units of their mean (RKD: Park et
    al., 2019, equation 5).

    student, teacher: vectors (batch, any width), of one batch. Huber's loss, averaged over ordered
    pairs with themselves.
    """
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return how the cosines of angles within a batch differ (RKD, equation 7). Vectors (batch, any
    width)."""
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def relation_loss(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], heads: int
) -> Tensor:
    """Return KL(teacher ‖ student) of the relations of tokens (MiniLM: Wang et al., 2020; v2:
    2021), averaged over rows.

    A relation is softmax(a·bᵀ / √d) in each of `heads` heads of d = width / heads.

    Args:
        student, teacher: pairs (a, b), (batch, tokens, width) each: queries and keys, or values
            twice. Widths may differ.
        heads: of the relation.

    Returns:
        A scalar.
    """
    log_s, log_t = (_relation(a, b, heads) for a, b in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()


def _relation(a: Tensor, b: Tensor, heads: int) -> Tensor:
    a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))
    return (a @ b.transpose(-2, -1) / math.sqrt(a.shape[-1])).log_softmax(-1)


def _distances(x: Tensor) -> Tensor:
    """Return Euclidean distances (batch, batch) over the mean of those that are not 0."""
    squares = x.square().sum(1)
    gaps = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    gaps = gaps * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return gaps / gaps[gaps > 0].mean() if len(x) > 1 else gaps


def _angles(x: Tensor) -> Tensor:
    """Return the cosines (batch, batch, batch) of the angle at each vector between each two
    others."""
    to = F.normalize(x[None] - x[:, None], dim=2)
    return to @ to.transpose(1, 2)
