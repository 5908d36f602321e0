"""Mean average precision of boxes as COCO defines it: 101 recalls, at most 100 boxes per image and
class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from greenvis.tasks._rows import RowMetric, joined

COCO = tuple(0.5 + 0.05 * i for i in range(10))
MOST = 100  # boxes per image and class


class BoxPrecision(RowMetric):
    """Mean over overlaps and over the classes that images have of the average precision, 0 to 1.

    Which answer meets which box is settled image by image; what is kept are scores and hits, so
    that batches and processes are added up.

    Args:
        overlaps: Intersections over union from which an answer is right.
    """

    def __init__(self, overlaps: Sequence[float] = COCO) -> None:
        super().__init__()
        self.overlaps = torch.tensor(overlaps, dtype=torch.float64)
        self.add_rows("scores", dtype=torch.float64)
        self.add_rows("classes", dtype=torch.int64)
        self.add_rows("hits", dims=2, dtype=torch.bool)
        self.add_rows("boxes", dtype=torch.int64)
        self.scores: list[Tensor]
        self.classes: list[Tensor]
        self.hits: list[Tensor]
        self.boxes: list[Tensor]

    def update(
        self, preds: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add images: of each the answers {"boxes" (n, 4), "scores" (n,), "labels" (n,)}, and what
        is there, {"boxes" (m, 4), "labels" (m,)}."""
        for answer, truth in zip(preds, target, strict=True):
            labels = truth["labels"]
            self.boxes.append(labels)
            for number in torch.cat([answer["labels"], labels]).unique():
                ours = (answer["labels"] == number).nonzero().flatten()
                theirs = torch.as_tensor(truth["boxes"])[labels == number]
                order = answer["scores"][ours].argsort(descending=True, stable=True)[:MOST]
                rows = ours[order]
                self.scores.append(answer["scores"][rows].double())
                self.classes.append(answer["labels"][rows])
                self.hits.append(matches(answer["boxes"][rows], theirs, self.overlaps))

    def compute(self) -> Tensor:
        """Return the mean; 0 where no image has a box."""
        present = joined(self.boxes).unique() if len(self.boxes) else torch.zeros(0)
        if not len(present) or not len(self.scores):
            return torch.zeros((), dtype=torch.float64)
        scores, classes = joined(self.scores), joined(self.classes)
        hits, boxes = joined(self.hits), joined(self.boxes)
        each = []
        for number in present:
            rows = classes == number
            order = scores[rows].argsort(descending=True, stable=True)
            each.append(average_precision(hits[rows][order], int((boxes == number).sum())))
        return torch.stack(each).mean()


def matches(boxes: Tensor, truths: Tensor, overlaps: Tensor) -> Tensor:
    """Return at which overlaps each answer is right: it takes the box it covers best of those that
    no surer answer has taken.

    Args:
        boxes: (n, 4), x1 y1 x2 y2, the surest first.
        truths: (m, 4).
        overlaps: (t,).

    Returns:
        bool (n, t).
    """
    from torchvision.ops import box_iou

    hits = torch.zeros(len(boxes), len(overlaps), dtype=torch.bool, device=boxes.device)
    if not len(truths) or not len(boxes):
        return hits
    ious = box_iou(boxes.double(), truths.as_subclass(Tensor).double()).cpu()
    for column, least in enumerate(overlaps.tolist()):
        free = torch.ones(len(truths), dtype=torch.bool)
        for row, own in enumerate(ious):
            candidates = own.masked_fill(~free, -1)
            best = len(own) - 1 - int(candidates.flip(0).argmax())  # the last of equals, as COCO's
            if candidates[best] >= min(least, 1 - 1e-10):
                free[best] = False
                hits[row, column] = True
    return hits


def average_precision(hits: Tensor, boxes: int) -> Tensor:
    """Return the precision at 101 recalls, a mean over them and over overlaps.

    Args:
        hits: bool (n, t), the surest answer first.
        boxes: How many there are to find.

    Returns:
        A scalar, 0 to 1.
    """
    right = hits.double().cumsum(0)
    places = torch.arange(1, len(hits) + 1, dtype=torch.float64, device=hits.device)
    precision = (right / places[:, None]).flip(0).cummax(0).values.flip(0)
    asked = torch.linspace(0, 1, 101, dtype=torch.float64, device=hits.device)
    out = []
    for column in range(hits.shape[1]):
        first = torch.searchsorted((right[:, column] / boxes).contiguous(), asked)
        reached = first < len(hits)
        values = (
            precision[:, column][first.clamp(max=max(len(hits) - 1, 0))] if len(hits) else asked
        )
        out.append(torch.where(reached, values, 0.0).mean())
    return torch.stack(out).mean()
