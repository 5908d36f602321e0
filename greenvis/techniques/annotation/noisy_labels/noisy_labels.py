"""Losses that wrong labels pull at less: GCE, SCE, and ELR, which holds to early answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, OnlyWith, Technique
from greenvis.errors import GreenvisError
from greenvis.techniques.annotation.noisy_labels._losses import (
    BySample,
    answered,
    early,
    generalised,
    means_of,
    symmetric,
)


class NoisyLabels(Technique):
    """Train by a loss that wrong labels pull at less (GCE: Zhang and Sabuncu, 2018; SCE: Wang et
    al., 2019; ELR: Liu et al., 2020).

    Saves labels: those of a crowd will do. Costs nothing: one forward and backward a step, as
    before. A large network answers the right class of wrongly labelled images early on and learns
    their labels by heart later: gce and sce stop caring for images it is far off of, elr holds each
    image's answer to the mean of its earlier ones. They learn more slowly, and lose where labels
    are right, where hard classes are taken for wrong ones, and where a small network could not
    memorise anyway. The task's label smoothing is not used. elr keeps a row of classes for each
    sample, so the loop must say which samples a batch holds (recipes do; elsewhere
    `live.set_samples`).

    Example:
        >>> live = gv.wrap(model, gv.NoisyLabels(loss="gce", q=0.7))
        >>> loss = live.criterion(F.cross_entropy)(model(x), y)
        >>> bool(0 < loss < 1 / 0.7)  # however wrong a label is
        True
    """

    name = "noisy_labels"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "its losses are of one class per image: leave it out"
    needs = frozenset({"gradients"})
    only_with: ClassVar[OnlyWith] = {
        "q": ("loss", ("gce",)),
        "alpha": ("loss", ("sce",)),
        "beta": ("loss", ("sce",)),
        "floor": ("loss", ("sce",)),
        "weight": ("loss", ("elr",)),
        "momentum": ("loss", ("elr",)),
    }
    examples: ClassVar = ({}, {"loss": "sce"})

    loss: Literal["gce", "sce", "elr"] = Field(
        default="gce", description="which loss stands for the cross entropy"
    )
    q: float = Field(
        default=0.7, gt=0, le=1, description="0: cross entropy; 1: absolute error, slow to learn"
    )
    alpha: float = Field(default=0.1, ge=0, description="factor of the cross entropy")
    beta: float = Field(default=1.0, ge=0, description="factor of the reverse cross entropy")
    floor: float = Field(default=-4.0, lt=0, description="what stands for the logarithm of 0")
    weight: float = Field(
        default=3.0, ge=0, description="how strongly answers are held to earlier ones"
    )
    momentum: float = Field(
        default=0.7, ge=0, lt=1, description="share of an image's mean answer that a visit leaves"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledNoisyLabels(self)


class InstalledNoisyLabels(Installed):
    """The loss at work."""

    def __init__(self, request: NoisyLabels) -> None:
        super().__init__()
        self.request, self.means = request, BySample()
        self.criterion = self._criterion

    def _criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        request = self.request
        if request.loss == "gce":
            return means_of(lambda logits, y, rows: generalised(logits, y, request.q))
        if request.loss == "sce":
            return means_of(
                lambda logits, y, rows: symmetric(
                    logits, y, request.alpha, request.beta, request.floor
                )
            )
        return means_of(self._early)

    def _early(self, logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Return cross entropy + weight · `early`, (batch,), and take the answers into the
        means."""
        samples = self.samples
        if samples is None or len(samples.positions) != len(rows):
            raise GreenvisError(
                "noisy_labels: elr keeps an answer of each sample, and this batch does not say "
                "which it holds: call live.set_samples(…) before each step, show labelled images "
                "alone, and leave out what mixes or adds images"
            )
        before = self.means.rows(samples, logits.new_zeros(logits.shape[1]))
        momentum = self.request.momentum
        targets = momentum * before + (1 - momentum) * answered(logits)
        if self.repeated:
            targets = before
        else:
            self.means.put(samples, targets)
        losses = F.cross_entropy(logits, y, reduction="none")
        return losses + self.request.weight * early(logits, targets)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean answers by sample."""
        return self.means.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.means.load_state_dict(state)
