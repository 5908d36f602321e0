"""Losses of single images that wrong labels pull at less, and what is kept of each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.core.technique import Samples, logits_of
from greenvis.errors import BadInput

_CLAMP = 1e-4  # of probabilities in ELR


def generalised(logits: Tensor, y: Tensor, q: float) -> Tensor:
    """Return (1 - p^q) / q of the label's probability p, (batch,) (GCE: Zhang and Sabuncu, 2018,
    equation 6): cross entropy at q = 0, absolute error at q = 1."""
    logs = logits.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -torch.expm1(q * logs) / q


def symmetric(logits: Tensor, y: Tensor, alpha: float, beta: float, floor: float) -> Tensor:
    """Return alpha · CE + beta · reverse CE, (batch,) (SCE: Wang et al., 2019, equation 6).

    Args:
        logits: (batch, classes).
        y: int64 (batch,).
        alpha: Factor of the cross entropy.
        beta: Factor of the reverse one, -sum of p · log(label).
        floor: What stands for log 0 there, A.
    """
    p = logits.softmax(1).gather(1, y[:, None])[:, 0]
    return alpha * F.cross_entropy(logits, y, reduction="none") - beta * floor * (1 - p)


def early(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log(1 - <target, p>), (batch,) (ELR: Liu et al., 2020, equation 6): answers are held
    to what they were early on.

    Args:
        logits: (batch, classes).
        targets: Means of the answers so far, (batch, classes).
    """
    p = logits.softmax(1).clamp(_CLAMP, 1 - _CLAMP)
    return (1 - (targets * p).sum(1)).log()


def answered(logits: Tensor) -> Tensor:
    """Return what ELR takes into its means: p within bounds, with a sum of 1, (batch, classes)."""
    p = logits.detach().softmax(1).clamp(_CLAMP, 1 - _CLAMP)
    return p / p.sum(1, keepdim=True)


def candidates_loss(logits: Tensor, weights: Tensor) -> Tensor:
    """Return -sum of w · log p over the candidates, (batch,) (PRODEN: Lv et al., 2020, equation
    7)."""
    return -(weights * logits.log_softmax(1)).sum(1)


def among(logits: Tensor, candidates: Tensor) -> Tensor:
    """Return the answers among the candidates, with a sum of 1 (PRODEN: Lv et al., 2020, equation
    8).

    Args:
        logits: (batch, classes).
        candidates: bool (batch, classes).
    """
    return logits.detach().masked_fill(~candidates, -torch.inf).softmax(1)


def means_of(each: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return a loss of outputs and labels int64 (batch,): the mean of `each` over the images whose
    label is known, 0 with a graph where none is.

    Args:
        each: Of logits float32 (n, classes), labels (n,) and their rows in the batch, int64 (n,).
    """

    def loss(outputs: Any, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.is_floating_point():
            raise BadInput("a loss for wrong labels takes one class each, int64 (batch,)")
        logits, rows = logits_of(outputs).float(), (y >= 0).nonzero().squeeze(1)
        if not len(rows):
            return 0.0 * logits.sum()
        return each(logits[rows], y[rows], rows).mean()

    return loss


class BySample:
    """A row of numbers for each sample of a data set, made when the first is asked for."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def rows(self, samples: Samples, first: Tensor) -> Tensor:
        """Return the rows of a batch's samples.

        Args:
            samples: Which they are.
            first: What a row begins with, (columns,), or one of each sample, (batch, columns).
        """
        if self.table is None:
            self.table = torch.full((samples.length, first.shape[-1]), torch.nan)
        self.table = self.table.to(first.device)
        rows = self.table[samples.positions.to(first.device)]
        return torch.where(rows.isnan(), first, rows)

    def put(self, samples: Samples, rows: Tensor) -> None:
        """Keep rows of a batch's samples, (batch, columns)."""
        assert self.table is not None
        self.table[samples.positions.to(self.table.device)] = rows.to(self.table.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the table, where there is one."""
        return {} if self.table is None else {"by_sample": self.table}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.table = state["by_sample"].clone() if state else None
