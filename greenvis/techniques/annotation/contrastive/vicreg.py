"""Pretraining by agreement, spread and independence of features, without negatives or a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed
from greenvis.techniques.annotation.contrastive._views import InstalledViews, ViewPretext, mlp

_EPS = 1e-4


def invariance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared difference of two views' projections, (batch, dim) each."""
    return F.mse_loss(first, second)


def variance(projections: Tensor) -> Tensor:
    """Return by how much the features' standard deviations over the batch stay below 1, the mean of
    (batch, dim)'s (Bardes et al., 2022, equation 1)."""
    spread = projections - projections.mean(0)
    variances = spread.square().sum(0) / max(len(projections) - 1, 1)
    return F.relu(1 - (variances + _EPS).sqrt()).mean()


def covariance(projections: Tensor) -> Tensor:
    """Return the sum of the squared covariances of different features, by the features (Bardes et
    al., 2022, equations 3 and 4).

    Args:
        projections: (batch, dim).
    """
    spread = projections - projections.mean(0)
    matrix = spread.T @ spread / max(len(projections) - 1, 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / projections.shape[1]


class Vicreg(ViewPretext):
    """Pretrain a model to give two views of an image like features that vary from image to image
    and from each other (VICReg: Bardes et al., 2022).

    Saves labels, not energy: a step costs twice a supervised one (two views), and a wide projection
    adds to that in small networks. No negatives, no target, no large batch. A pretext: labels are
    not used, and the classifier stays untrained. Adds the term "vicreg", from a projection of three
    layers beside the classifier that `merge` drops; as in the authors' code the variances of both
    views count half each. On several processes each takes the statistics of its own images.

    Example:
        >>> live = gv.wrap(model, gv.Vicreg(dim=32))
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "vicreg"
    examples = ({"dim": 8},)

    invariance: float = Field(default=25.0, ge=0, description="weight of the views' difference")
    variance: float = Field(default=25.0, ge=0, description="weight of the features' spread")
    covariance: float = Field(default=1.0, ge=0, description="weight of what they share")
    dim: int = Field(default=512, ge=2, description="width of the projection and its hidden layers")

    def install(self, model: nn.Module) -> Installed:
        """Put the projection in. Raises BadInput for a model that shows no classifier."""
        representation = self.represent(model)
        widths = (representation.dim, self.dim, self.dim, self.dim)
        return InstalledVicreg(self, representation, {"project": mlp(*widths, norm=True)})


class InstalledVicreg(InstalledViews[Vicreg]):
    """Three losses of two views."""

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"vicreg"}, the weighted sum for two views of images x (batch, channels, height,
        width)."""
        request = self.request
        both = [z.float() for z in self.project(request.views(x)).chunk(2)]
        spread = torch.stack([variance(z) for z in both]).mean()
        shared = torch.stack([covariance(z) for z in both]).sum()
        loss = request.invariance * invariance(*both)
        return {"vicreg": loss + request.variance * spread + request.covariance * shared}
