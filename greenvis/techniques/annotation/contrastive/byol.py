"""Pretraining without negatives: one view is to foretell what a slower copy makes of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed
from greenvis.techniques.annotation.contrastive._views import InstalledFollowed, ViewPretext, mlp


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 2 − 2 · cosine, the squared distance of the normalised vectors (Grill et al., 2020,
    equation 2).

    Args:
        predicted: (batch, dim), of one view.
        target: (batch, dim), of the other; no gradient flows there.

    Returns:
        The mean over the batch, a scalar.
    """
    cosine = F.cosine_similarity(predicted.float(), target.detach().float(), dim=1)
    return (2 - 2 * cosine).mean()


class Byol(ViewPretext):
    """Pretrain a model to predict, from one view of an image, what a slower copy of it makes of
    another (BYOL: Grill et al., 2020).

    Saves labels, not energy: a step costs 2.7 times a supervised one (two views forward and
    backward, two more forward), and needs no large batches. A pretext: labels are not used, and the
    classifier stays untrained. Adds the term "byol", the loss of both directions, from a projection
    and a predictor beside the classifier, which `merge` drops. The target begins as the model and
    follows it; its momentum rises from `momentum` to 1 where the length of the training is known.
    0.996 is the paper's, for a million images; small sets want less. Loses where the batch norms of
    its heads see batches of a few images.

    Example:
        >>> live = gv.wrap(model, gv.Byol(dim=16))
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "byol"
    examples = ({"dim": 8},)

    momentum: float = Field(
        default=0.99, ge=0, le=1, description="share of the target that a step leaves, at first"
    )
    dim: int = Field(default=256, ge=2, description="width of the projection")

    def install(self, model: nn.Module) -> Installed:
        """Put projection and predictor in. Raises BadInput for a model that shows no classifier."""
        representation = self.represent(model)
        hidden = 2 * representation.dim
        heads: dict[str, nn.Module] = {
            "project": mlp(representation.dim, hidden, self.dim, norm=True),
            "predict": mlp(self.dim, hidden, self.dim, norm=True),
        }
        return InstalledByol(self, representation, heads, self.momentum, without=("predict",))


class InstalledByol(InstalledFollowed[Byol]):
    """Prediction of the target."""

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"byol"}: `byol_loss` of each view of images x (batch, channels, height, width)
        with the other."""
        views = self.request.views(x)
        predicted = self.heads["predict"](self.project(views))
        target = torch.cat(self.target(views).chunk(2)[::-1])
        return {"byol": 2 * byol_loss(predicted, target)}
