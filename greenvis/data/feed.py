"""A stream of images beside the labelled batches, whose order follows from seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from greenvis.data.image_set import ImageSet
from greenvis.data.loaders import order


class Feed:
    """Images of a set, pass after pass, each in an order of its own (`greenvis.core.feeds`).

    Args:
        images: Whose labels are not looked at.
        batch_size: Images of a batch.
        seed: Of the order.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, number: int) -> Tensor:
        return order(len(self.images), epoch=number, seed=self.seed, shuffle=True)

    def at(self, number: int, times: int) -> Tensor:
        """Return `times` batches, from batch number · times of all passes in one row.

        Args:
            number: Of the step.
            times: Batches.

        Returns:
            float32 (times · batch_size, C, H, W); a pass's last images and the next one's first may
            stand together.
        """
        first, size, out = number * times * self.batch_size, len(self.images), []
        end = first + times * self.batch_size
        while first < end:
            epoch, start = divmod(first, size)
            rows = self._order(epoch)[start : start + end - first]
            out.append(self.images.batch(rows, epoch)[0])
            first += len(rows)
        return torch.cat(out)

    def sweep(self) -> Iterator[Tensor]:
        """Yield each image once, in the set's own order, float32 (batch, C, H, W)."""
        for rows in torch.arange(len(self.images)).split(self.batch_size):
            yield self.images.batch(rows)[0]
