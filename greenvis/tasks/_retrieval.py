"""Which texts images find again, over a whole test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.tasks._rows import RowMetric, joined
from greenvis.tasks.answers import UNKNOWN

if TYPE_CHECKING:
    from greenvis.tasks.image_text import Pairs


class _Embeddings(RowMetric):
    """Embeddings of all images and texts, and which text each image has."""

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("images", dims=2, dtype=torch.float64)
        self.add_rows("texts", dims=2, dtype=torch.float64)
        self.add_rows("labels", dtype=torch.int64)
        self.images: list[Tensor]
        self.texts: list[Tensor]
        self.labels: list[Tensor]

    def update(self, preds: Pairs, target: Tensor) -> None:
        """Add pairs, and the number of each one's text (batch,)."""
        known = target != UNKNOWN
        self.images.append(F.normalize(preds.images[known].double(), dim=1))
        self.texts.append(F.normalize(preds.texts[known].double(), dim=1))
        self.labels.append(target[known])

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return images, texts, the text number of each from 0 on, and how many numbers."""
        labels = joined(self.labels)
        numbers, own = labels.unique(return_inverse=True)
        return joined(self.images), joined(self.texts), own, len(numbers)

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Return how near each image is to the texts (images, numbers), and its own number."""
        raise NotImplementedError


class Recall(_Embeddings):
    """Share of images whose text is among the nearest, 0 to 1.

    Args:
        nearest: How many.
    """

    def __init__(self, nearest: int) -> None:
        super().__init__()
        self.nearest = nearest

    def _scores(self) -> tuple[Tensor, Tensor]:
        images, texts, own, count = self._gathered()
        nearness = images @ texts.T  # of texts of one number the nearest counts
        best = nearness.new_full((len(images), count), -2.0)
        return best.scatter_reduce(1, own.expand(len(images), -1), nearness, "amax"), own

    def compute(self) -> Tensor:
        """Return the share; 0 of none."""
        if not len(self.labels) or not len(joined(self.labels)):
            return torch.zeros(())
        scores, own = self._scores()
        right = scores.gather(1, own[:, None])
        nearer, equal = (scores > right).sum(1), (scores == right).sum(1)
        # of texts that are equally near each is as likely to come first
        return ((self.nearest - nearer) / equal).clamp(0, 1).double().mean()


class ZeroShot(Recall):
    """Share of images nearer to the mean of their own number's texts than to any other's."""

    def __init__(self) -> None:
        super().__init__(1)

    def _scores(self) -> tuple[Tensor, Tensor]:
        images, texts, own, count = self._gathered()
        sums = texts.new_zeros(count, texts.shape[1]).index_add(0, own, texts)
        return images @ F.normalize(sums, dim=1).T, own
