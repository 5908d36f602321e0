"""Contrastive pretraining: two views of an image are to be nearer each other than any other
image's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques._shared.views import random_view

_CHILD = "simclr"


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the normalised temperature-scaled cross entropy (Chen et al., 2020, equation 1).

    Each of the 2 · batch projections is to tell its partner, by cosine, from the other
    2 · batch − 2; itself does not compete.

    Args:
        first, second: projections of the two views, (batch, dim) each.
        temperature: divides the cosines.

    Returns:
        A scalar.
    """
    both = F.normalize(torch.cat([first, second]).float(), dim=1)
    likeness = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return F.cross_entropy(likeness, partner)


class Simclr(Technique):
    """Pretrain a model to know two random views of an image for one another among a batch (SimCLR:
    Chen et al., 2020).

    Saves labels, not energy: a step costs twice a supervised one (two views), and more epochs are
    needed. A pretext: labels are not used, and the classifier stays untrained. Adds the term
    "simclr", from a two-layer projection beside the classifier that
    `merge` drops. The other images of the batch are what each is told from, so small batches teach
    less; on several processes each tells apart its own. The views are made here, of the images the
    loop shows: crop, flip, contrast and brightness (of the paper's, hue and blur are left out).

    Example:
        >>> live = gv.wrap(model, gv.Simclr(temperature=0.2))
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "simclr"
    stage = "objective"
    tasks = IMAGES
    instead = (
        "it works on batches of images alone: take a first stage of these, and begin from its model"
    )
    needs = frozenset({"trainable_base"})
    examples = ({"dim": 8},)

    temperature: float = Field(
        default=0.5, gt=0, description="divides the cosines: smaller looks at the nearest more"
    )
    dim: int = Field(default=128, ge=2, description="width of the projection")
    area: float = Field(
        default=0.25, gt=0, le=1, description="smallest share of the image that a view shows"
    )
    colour: float = Field(
        default=0.4, ge=0, le=1, description="how far contrast and brightness change"
    )
    flip: bool = Field(default=True, description="turn views left to right half the time")
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the projection in. Raises BadInput for a model that shows no classifier."""
        representation = Representation(model, view(model, self.input_shape, probe=False))
        width = representation.dim
        projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim))
        return InstalledSimclr(
            self, representation.add(_CHILD, projection), representation, projection
        )


class InstalledSimclr(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self,
        request: Simclr,
        names: tuple[str, ...],
        representation: Representation,
        projection: nn.Module,
    ) -> None:
        super().__init__(names)
        self.request, self.representation, self.projection = request, representation, projection

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"simclr"}: `nt_xent` of two views of images x (batch, channels, height,
        width)."""
        request = self.request
        views = [random_view(x, request.area, request.colour, request.flip) for _ in range(2)]
        first, second = self.projection(self.representation(torch.cat(views))).chunk(2)
        return {"simclr": nt_xent(first, second, request.temperature)}
