"""Uncertain feature statistics: each image is shown in styles that its batch makes likely."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.models.structure import view
from greenvis.techniques.data.generalise._style import EPS, INSTEAD, TASKS, Where, attach, style


def uncertainty(statistic: Tensor) -> Tensor:
    """Return how far a statistic varies over the batch (equations 4 and 5): the root of its
    unbiased variance + 1e-6.

    Args:
        statistic: (batch, …).

    Returns:
        (1, …).
    """
    return (statistic.var(0, keepdim=True) + EPS).sqrt()


def perturbed(x: Tensor, axes: tuple[int, ...], noise_mean: Tensor, noise_std: Tensor) -> Tensor:
    """Return features whose mean and deviation are drawn about their own (equations 6 to 9).

    γ·(x − μ)/σ + β with β = μ + noise · Σμ and γ = σ + noise · Σσ, where Σ is the `uncertainty`.
    The gradient flows through all of them.

    Args:
        x: Features, the batch (of two or more) first.
        axes: Of the positions.
        noise_mean: Normal, of the shape of the means: 1 along `axes`.
        noise_std: Likewise.

    Returns:
        Of the shape of x.
    """
    mean, std = style(x, axes)
    beta = mean + noise_mean * uncertainty(mean)
    gamma = std + noise_std * uncertainty(std)
    return gamma * (x - mean) / std + beta


class Dsu(Technique):
    """Train on features whose mean and deviation are uncertain: drawn anew about each image's own,
    as far as those of the batch vary (DSU: Li et al., 2022, equation 9).

    For images in other styles than those of training; serving costs nothing. Training costs about a
    fifth more on a small network. Colour jitter of the images is cheaper and often as good: compare
    with it. Loses where the style is what tells classes apart, and mostly where test images are
    like those of training. Class and register tokens stay as they are; a batch of one and a map of
    one position, which have no statistics, pass unchanged. Draws from torch's own random state. Off
    in eval.

    Example:
        >>> live = gv.wrap(model, gv.Dsu(p=0.5))
        >>> logits = model.train()(x)  # otherwise each time
    """

    name = "dsu"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples: ClassVar = ({}, {"p": 1.0, "where": (0,)})

    p: float = Field(default=0.5, ge=0, le=1, description="how likely each site acts in a step")
    where: Where | None = Field(
        default=None,
        description="stages it acts behind: 0 the first layer, 1, 2, … the stages (of a plain "
        "transformer its quarters); all where absent",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Hang it on the model. Raises BadInput where features have no positions."""
        structure = view(model, self.input_shape, probe=False)
        attach(model, structure, self.where, self.name, self._change)
        return Installed()

    def _change(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        if len(x) < 2 or not torch.rand(()) < self.p:
            return x
        like = x.mean(axes, keepdim=True)
        # the mean's first, as the authors draw them
        noise_mean, noise_std = torch.randn_like(like), torch.randn_like(like)
        return perturbed(x, axes, noise_mean, noise_std)
