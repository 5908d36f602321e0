"""Tasks that answer with several entries per sample, of which some may not be known."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from greenvis.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor


class EntryTask(Task):
    """A task whose loss is a mean over the entries (batch, entries) that are known."""

    @abstractmethod
    def entries(self, outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry, and whether it is known.

        Args:
            outputs: (batch, entries).
            labels: (batch, entries).

        Returns:
            Losses (batch, entries), 0 where not known, and bool (batch, entries).
        """

    def losses(self, outputs: Any, labels: Any) -> Tensor:
        """Return the loss of each sample, a mean over its entries that are known."""
        losses, known = self.entries(outputs, labels)
        return losses.sum(1) / known.sum(1).clamp(min=1)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the mean loss over all entries that are known."""
        losses, known = self.entries(outputs, labels)
        return losses.sum() / known.sum().clamp(min=1)
