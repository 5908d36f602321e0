"""What a model of bags says of the images in them, though only bags have labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from greenvis import data
from greenvis.core.modes import in_mode
from greenvis.core.wrap import Wrapped
from greenvis.data.bags import CLASSES, Bags
from greenvis.data.splits import Split
from greenvis.meters.track import Tracker

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared

SHEET = "instances.png"
_SHOWN = 24  # images of either end in the sheet
_BATCH = 64  # bags


def ranking_auc(scores: Tensor, positive: Tensor, bag: Tensor) -> float | None:
    """Return how often a positive image of a bag has a higher score than a negative one of the same
    bag, ties by half: the area under the ROC curve, 0 to 1, a mean over bags with both.

    Args:
        scores: (rows,).
        positive: bool (rows,).
        bag: int64 (rows,), which bag each is of.

    Returns:
        The mean; None where no bag has both.
    """
    areas = []
    for number in bag.unique():
        own, right = scores[bag == number].double(), positive[bag == number]
        if right.any() and not right.all():
            apart = own[right][:, None] - own[~right][None]
            areas.append(((apart > 0).double() + 0.5 * (apart == 0).double()).mean())
    return float(torch.stack(areas).mean()) if areas else None


def on_test(prepared: Prepared, live: Wrapped, tracker: Tracker) -> None:
    """Record how well a model of bags ranks the images in positive ones ("instance_auc"), where the
    data knows, and draw those of highest and of lowest score in a sheet beside the record."""
    test, own = prepared.images.test, hasattr(live.model, "instance_scores")
    if not isinstance(test, Bags) or not own or (truth := test.makes_positive) is None:
        return
    scores = []
    with tracker.phase("eval"), live.served() as model, in_mode(model, False):
        device = next(model.parameters()).device
        for x, _ in data.batches(test, _BATCH):
            with torch.inference_mode():
                score_of: Any = model.instance_scores
                scores.append(x.to(device).call(score_of).cpu())
    score = torch.cat(scores)
    bag = torch.arange(len(test)).repeat_interleave(torch.tensor([len(m) for m in test.members]))
    area = ranking_auc(score, truth, bag)
    if area is None:
        return
    tracker.fact(instance_auc=area)
    order = score.argsort(descending=True)
    shown = torch.cat([order[:_SHOWN], order[_SHOWN:][-_SHOWN:]])
    rows = torch.cat(test.members)[shown]
    named = tuple(f"{value:.3g}" for value in score[shown].tolist())
    split = Split(test.images.split.take(rows).images, truth[shown].long(), named)
    from greenvis.data.sheets import sheet  # takes PIL

    sheet(split, CLASSES).save(tracker.path.parent / SHEET)
