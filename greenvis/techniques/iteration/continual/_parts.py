"""The loss of a batch that has replayed examples behind the new ones: a mean over each part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.core import distributed as ranks
from greenvis.errors import BadInput


def er_ace_loss(
    logits: Tensor,
    y: Tensor,
    fresh: int,
    task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the asymmetric loss of ER-ACE (Caccia et al., 2022, eq. 3).

    New images compete among the classes of their own batch, so that they do not push earlier
    classes down; replayed ones among all. Each part is a mean of its own. Of several processes the
    batch is all of theirs.

    Args:
        logits: (fresh + replayed, classes), the new images first.
        y: int64 (fresh + replayed,).
        fresh: how many images are new.
        task_loss: of logits and labels.

    Returns:
        A scalar.
    """
    own = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    own[y[:fresh].unique()] = True
    away = ~ranks.any_of(own)
    new, old = ranks.part_weights((fresh, len(y) - fresh), logits)
    loss = new * task_loss(
        logits[:fresh].masked_fill(away, torch.finfo(logits.dtype).min), y[:fresh]
    )
    return loss + old * task_loss(logits[fresh:], y[fresh:]) if len(y) > fresh else loss


class Parts:
    """The parts of a batch, and the task loss over them as a method of replay has it.

    Args:
        method: As `Replay.method`.
        beta: Of derpp: weight of the second draw.

    Attributes:
        sizes: Of the batch now: how many images are new, and of each draw.
    """

    def __init__(self, method: str, beta: float) -> None:
        self.method, self.beta = method, beta
        self.sizes: list[int] = []
        self._first: list[int] = []  # of the optimizer step's first batch, empty before it

    def begin(self, sizes: list[int]) -> None:
        """Take the next batch's parts. Raises BadInput for a further batch of an optimizer step
        where the loss, of means over parts, is not that of one big batch."""
        self.sizes = sizes
        if not self._first:
            self._first = sizes
            return
        method, first = self.method, self._first
        uneven = [n * first[0] for n in sizes] != [n * sizes[0] for n in first]
        if method != "er_ace" and not (method in ("der", "derpp") and uneven):
            return
        self._first = []
        why = (
            "has new images compete among the classes of one batch"
            if method == "er_ace"
            else f"takes a mean over each part, and after {first} new and replayed images come "
            f"{sizes}"
        )
        raise BadInput(
            f"replay with {method} cannot accumulate gradients here: it {why}. Use one batch an "
            "optimizer step, or method er (der: every 1, share 1); a loop of your own calls "
            "live.step_end() after each step"
        )

    def step_end(self) -> None:
        """After the optimizer step."""
        self._first = []

    def weights(self, logits: Tensor) -> list[float | Tensor]:
        """Return what a mean over each part of the batch counts for; every process asks at the same
        place."""
        return ranks.part_weights((*self.sizes, 0, 0)[:3], logits)

    def criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the task loss over the parts of the batch, as the method has it."""

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            fresh = self.sizes[0]
            if self.method == "er_ace":
                return er_ace_loss(logits, y, fresh, task_loss)
            weights = self.weights(logits)
            own = weights[0] * task_loss(logits[:fresh], y[:fresh])
            if self.method == "der" or len(self.sizes) < 3:
                return own
            again = slice(fresh + self.sizes[1], None)
            return own + self.beta * weights[2] * task_loss(logits[again], y[again])

        return loss
