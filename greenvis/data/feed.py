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

    def _rows(self, number: int, times: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (pass, positions) of the images from batch number · times of all passes on."""
        first, size = number * times * self.batch_size, len(self.images)
        end = first + times * self.batch_size
        while first < end:
            epoch, start = divmod(first, size)
            rows = self._order(epoch)[start : start + end - first]
            yield epoch, rows
            first += len(rows)

    def positions(self, number: int, times: int) -> Tensor:
        """Return where the images of `at` stand in the set.

        Args:
            number: Of the step.
            times: Batches.

        Returns:
            int64 (times · batch_size,).
        """
        return torch.cat([rows for _, rows in self._rows(number, times)])

    def at(self, number: int, times: int, where: Tensor | None = None) -> Tensor:
        """Return `times` batches, from batch number · times of all passes in one row.

        Args:
            number: Of the step.
            times: Batches.
            where: Which of their images alone, int64 (n,) in rising order, at least one; None: all.

        Returns:
            float32 (times · batch_size, C, H, W); a pass's last images and the next one's first may
            stand together.
        """
        out, before = [], 0
        for epoch, rows in self._rows(number, times):
            chosen = rows
            if where is not None:
                chosen = rows[where[(where >= before) & (where < before + len(rows))] - before]
            if len(chosen):
                out.append(self.images.batch(chosen, epoch)[0])
            before += len(rows)
        return torch.cat(out)

    def sweep(self) -> Iterator[Tensor]:
        """Yield each image once, in the set's own order, float32 (batch, C, H, W)."""
        for rows in torch.arange(len(self.images)).split(self.batch_size):
            yield self.images.batch(rows)[0]
