"""Mixed styles: each image is shown, now and then, in a style between its own and another's."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import GreenvisError
from greenvis.models.structure import view
from greenvis.techniques.data.generalise._style import INSTEAD, TASKS, Where, attach, style

_STAGES = 2  # as its authors have it: behind the first blocks, whose features are style


def mixed(x: Tensor, axes: tuple[int, ...], partner: Tensor, share: Tensor) -> Tensor:
    """Return features in a style between their own and their partners' (equations 3 to 5).

    γ·(x − μ)/σ + β with β = λμ + (1 − λ)μ′ and γ = λσ + (1 − λ)σ′. No gradient flows through the
    statistics.

    Args:
        x: Features, the batch first.
        axes: Of the positions.
        partner: int64 (batch,), rows of x.
        share: λ of the own style, (batch,).

    Returns:
        Of the shape of x.
    """
    mean, std = (statistic.detach() for statistic in style(x, axes))
    share = share.to(x).view(-1, *[1] * (x.dim() - 1))
    beta = share * mean + (1 - share) * mean[partner]
    gamma = share * std + (1 - share) * std[partner]
    return gamma * (x - mean) / std + beta


def across(domains: Tensor) -> Tensor:
    """Return for each row one of another domain, drawn at random; itself where there is none.

    Args:
        domains: int64 (batch,), -1 where not known.

    Returns:
        int64 (batch,).
    """
    other = (domains[:, None] != domains) & (domains[:, None] >= 0) & (domains >= 0)
    draws = torch.rand(len(domains), len(domains)).masked_fill(~other, -1.0)
    best, partner = draws.max(1)
    return torch.where(best >= 0, partner, torch.arange(len(domains)))


class Mixstyle(Technique):
    """Train on features in styles between those of two images of the batch (MixStyle: Zhou et al.,
    2021, equation 5).

    For images in other styles than those of training; costs little in training, nothing when
    served. Often no better than training without it beside tuned training (DomainBed: Gulrajani and
    Lopez-Paz, 2021), and worse on images like those of training. With `shuffle: crossdomain`
    partners are of another domain: a recipe says of which by `data.domains.train`, a loop of your
    own by `live.set_domains(domains)` before each step. Class and register tokens stay as they are.
    Draws from torch's own random state. Off in eval.

    Example:
        >>> live = gv.wrap(model, gv.Mixstyle(where=(1,)))
        >>> logits = model.train()(x)  # otherwise each time
    """

    name = "mixstyle"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples: ClassVar = ({}, {"p": 1.0, "shuffle": "crossdomain", "where": (0, 1)})

    p: float = Field(default=0.5, ge=0, le=1, description="how likely each site acts in a step")
    alpha: float = Field(
        default=0.1, gt=0, le=100, description="of the Beta distribution (alpha, alpha) of shares"
    )
    shuffle: Literal["random", "crossdomain"] = Field(
        default="random", description="partners: any image, or one of another domain"
    )
    where: Where | None = Field(
        default=None,
        description="stages it acts behind: 0 the first layer, 1, 2, … the stages (of a plain "
        "transformer its quarters); the first two stages where absent",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Hang it on the model. Raises BadInput where features have no positions."""
        structure = view(model, self.input_shape, probe=False)
        live = InstalledMixstyle(self)
        attach(model, structure, self.where, self.name, live.change, stages=_STAGES)
        return live


class InstalledMixstyle(Installed):
    """Mixing at work."""

    def __init__(self, request: Mixstyle) -> None:
        super().__init__()
        self.request = request
        self.by_domain = request.shuffle == "crossdomain"

    def change(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return features in mixed styles, or as they are, as it is drawn."""
        if not torch.rand(()) < self.request.p:
            return x
        share = torch.distributions.Beta(self.request.alpha, self.request.alpha).sample((len(x),))
        return mixed(x, axes, self._partners(len(x)).to(x.device), share)

    def _partners(self, count: int) -> Tensor:
        if not self.by_domain:
            return torch.randperm(count)
        if self.domains is None:
            raise GreenvisError(
                "mixstyle with shuffle: crossdomain must know what domain each image is of: call "
                "live.set_domains(domains) before each step, or set shuffle: random"
            )
        domains = torch.full((count,), -1)  # of rows that a technique put behind the batch
        own = self.domains[:count]
        domains[: len(own)] = own.cpu()
        return across(domains)
