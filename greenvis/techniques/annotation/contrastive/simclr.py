"""Contrastive pretraining: two views of an image are to be nearer each other than any other
image's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.models.structure import view
from greenvis.techniques._shared.representation import Representation

_CHILD = "simclr"
_ASPECT = 4 / 3  # a crop's sides are to each other at most as this, stretched back to the image's


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


def random_view(images: Tensor, area: float, colour: float, flip: bool = True) -> Tensor:
    """Return another look at each image, drawn from torch's random state, in one resampling.

    Args:
        images: (batch, channels, height, width).
        area: least share of the image that a crop shows; its sides are stretched by up to 4 : 3,
            and it is brought back to the image's size.
        colour: greatest change of contrast (a factor about the image's mean) and of brightness (a
            shift in units of its standard deviation).
        flip: whether half of the images are turned left to right.

    Returns:
        The views, of the images' shape and dtype.
    """
    count, device = len(images), images.device

    def drawn(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device) * (high - low) + low

    share = drawn(area, 1.0)
    # both sides within the image
    stretch = (drawn(-1.0, 1.0) * share.log().neg().clamp(max=math.log(_ASPECT))).exp().sqrt()
    height, width = share.sqrt() / stretch, share.sqrt() * stretch
    down, across = (drawn(-1.0, 1.0) * (1 - size) for size in (height, width))
    turned = (
        torch.where(drawn(0.0, 1.0) < 0.5, -1.0, 1.0) if flip else torch.ones(count, device=device)
    )
    zero = torch.zeros(count, device=device)
    theta = torch.stack(
        [torch.stack([width * turned, zero, across], 1), torch.stack([zero, height, down], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    mean, deviation = out.mean((1, 2, 3), keepdim=True), out.std((1, 2, 3), keepdim=True)
    contrast, brightness = (drawn(-colour, colour).view(-1, 1, 1, 1) for _ in range(2))
    return ((out - mean) * (1 + contrast) + mean + brightness * deviation).to(images.dtype)


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
