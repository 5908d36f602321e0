"""What notices that adaptation makes a model worse, without labels."""

from __future__ import annotations

import math

from torch import Tensor

from greenvis.techniques._shared.entropy import entropy, entropy_of

WINDOW = 256.0  # images that are remembered
MARGIN = 0.1  # by which batch statistics must make answers surer to be believed
NARROW = 0.5  # the least share of the source's effective number of classes
_TINY = 1e-4  # nats: rounding is no sign


class Guard:
    """Compares an adapted model's answers with the source model's, over the last images.

    It trusts answers that are surer than the source's and spread over as many classes. Batch
    statistics of few classes (a stream sorted by class, tiny batches) make a model less sure than
    it was; entropy minimisation that collapses makes it sure of few classes.

    Args:
        margin: By which share the mean entropy must be below the source's.
    """

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.reason = ""
        self.clear()

    def clear(self) -> None:
        """Forget the images so far."""
        self._images = 0.0  # those before count less
        self._entropies = [0.0, 0.0]  # sums of the source's and of the adapted model's
        self._answers: list[Tensor | float] = [0.0, 0.0]

    def trusts(self, source: Tensor, adapted: Tensor) -> bool:
        """Say whether the adapted model is to answer; if not, `reason` is "unsure" or "narrow".

        Args:
            source: Logits (batch, classes) of the source model.
            adapted: Of the adapted one, on the same images.
        """
        old = math.exp(-len(source) / WINDOW)
        self._images = old * self._images + len(source)
        effective = []
        for i, logits in enumerate((source.detach(), adapted.detach())):
            unsure, answers = entropy(logits).sum().item(), logits.float().softmax(-1).sum(0)
            self._entropies[i] = old * self._entropies[i] + unsure
            self._answers[i] = total = old * self._answers[i] + answers
            effective.append(entropy_of(total / self._images).exp().item())
        was, now = (total / self._images for total in self._entropies)
        self.reason = (
            "unsure"
            if not now <= (1 - self.margin) * was + _TINY
            else "narrow"
            if effective[1] < NARROW * effective[0]
            else ""
        )
        return not self.reason
