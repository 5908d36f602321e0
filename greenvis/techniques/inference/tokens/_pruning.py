"""The mathematics of removing tokens: predictor, masked attention and ratio loss of DynamicViT;
class attention of EViT.

Pure functions of tensors, and a small network; they know no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def masked_softmax(logits: Tensor, policy: Tensor, eps: float = EPS) -> Tensor:
    """Return attention over the tokens a policy keeps (Rao et al., 2021, eq. 10-11); each token
    always sees itself.

    logits: (batch, heads, length, length). policy: (batch, length, 1), 1 for kept tokens. Rows sum
    to about 1: eps / length is added to each weight and eps to their sum.
    """
    length = logits.shape[-1]
    visible = policy_matrix(policy[..., 0]).to(logits.dtype)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * visible
    return (weights + eps / length) / (weights.sum(-1, keepdim=True) + eps)


def policy_matrix(policy: Tensor) -> Tensor:
    """Return which tokens each token sees, (batch, 1, length, length), from a policy (batch,
    length): the kept, and itself."""
    itself = torch.eye(policy.shape[1], dtype=policy.dtype, device=policy.device)
    return policy[:, None, None, :] + (1 - policy)[:, None, None, :] * itself


def policy_mask(policy: Tensor, eps: float = EPS) -> Tensor:
    """Return what to add to attention logits so that their softmax is `masked_softmax`'s, but for
    terms of size eps: fp32 (batch, 1, length, length). Its gradient to the policy is that of the
    masked softmax, also where the policy is 0."""
    return (policy_matrix(policy.float()) + eps).log()


class Predictor(nn.Module):
    """Says for each token whether to keep it, from its own features and the mean of those kept (Rao
    et al., 2021, eq. 1-5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )  # fmt: skip

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        """Return log probabilities (batch, length, 2), keep first. x: (batch, length, dim). policy:
        (batch, length, 1)."""
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        pooled = (x[..., half:] * policy).sum(1, keepdim=True) / policy.sum(1, keepdim=True).clamp(
            min=1
        )
        return self.out_conv(torch.cat([x[..., :half], pooled.expand(-1, x.shape[1], -1)], -1))


def decide(log_probabilities: Tensor, policy: Tensor) -> Tensor:
    """Draw 1 (keep) or 0 for each token, never 1 for one that has left, by straight-through
    Gumbel-softmax: (batch, length).

    log_probabilities: (batch, length, 2). policy: (batch, length).
    """
    return F.gumbel_softmax(log_probabilities.float(), hard=True)[..., 0] * policy


def ratio_loss(policies: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """Return the mean squared distance of the share of tokens kept, of each image at each place,
    from what it should be.

    policies: (batch, length) for each place (Rao et al., 2021, eq. 15); ratios: the share to keep
    at each.
    """
    return torch.stack(
        [(p.mean(1) - r).square().mean() for p, r in zip(policies, ratios, strict=True)]
    ).mean()


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` highest scores (batch, length), in the order of places:
    int64 (batch, count)."""
    return scores.argsort(dim=1, descending=True)[:, :count].sort(dim=1).values


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Return how much the class token attends to each token, the mean over heads: fp32 (batch,
    length).

    query, key: (batch, length, heads, dim), the class token first (Liang et al., 2022, eq. 2).
    """
    logits = torch.einsum("bhd,bnhd->bhn", query[:, 0].float(), key.float()) * key.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)


def fused(x: Tensor, weights: Tensor, keep_index: Tensor) -> Tensor:
    """Return the tokens that are not kept as one, their sum by weight: (batch, 1, channels) (Liang
    et al., 2022, eq. 3).

    x: (batch, length, channels). weights: (batch, length). keep_index: int64 (batch, count).
    """
    rest = weights.scatter(1, keep_index, 0.0)
    return (rest.unsqueeze(1).to(x.dtype)) @ x
