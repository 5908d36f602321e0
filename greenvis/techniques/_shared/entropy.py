"""How unsure answers are."""

from __future__ import annotations

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each answer in nats, (batch,), of logits (batch, classes)."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats, (…,), of probabilities (…, classes) that may be 0."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)
