"""Contrastive pretraining: two views of an image are to be nearer each other than any other
image's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed
from greenvis.techniques.annotation.contrastive._views import InstalledViews, ViewPretext, mlp


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


class Simclr(ViewPretext):
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
    examples = ({"dim": 8},)

    temperature: float = Field(
        default=0.5, gt=0, description="divides the cosines: smaller looks at the nearest more"
    )
    dim: int = Field(default=128, ge=2, description="width of the projection")

    def install(self, model: nn.Module) -> Installed:
        """Put the projection in. Raises BadInput for a model that shows no classifier."""
        representation = self.represent(model)
        width = representation.dim
        heads: dict[str, nn.Module] = {"project": mlp(width, width, self.dim)}
        return InstalledSimclr(self, representation, heads)


class InstalledSimclr(InstalledViews[Simclr]):
    """Two views told from the rest of the batch."""

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"simclr"}: `nt_xent` of two views of images x (batch, channels, height,
        width)."""
        first, second = self.project(self.request.views(x)).chunk(2)
        return {"simclr": nt_xent(first, second, self.request.temperature)}
