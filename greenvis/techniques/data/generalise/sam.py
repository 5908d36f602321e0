"""Sharpness-aware minimisation: go by the gradient at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from greenvis.core.modes import untracked_norms
from greenvis.core.technique import Installed, Technique
from greenvis.techniques._shared.ascent import ascent, finite


class Sam(Technique):
    """Train towards flat minima: each step goes by the gradient at the worst weights within rho
    (SAM: Foret et al., 2021; adaptive, ASAM: Kwon et al., 2021).

    Costs a second forward and backward each step, so twice the energy of training; serving costs
    what it did. What it buys, on images unlike those of training, is often nothing beside well
    tuned training (DomainBed: Gulrajani and Lopez-Paz, 2021): compare with twice the epochs. Batch
    norms track the first forward alone; dropout draws the same numbers twice. One batch an
    optimizer step, one process, and no fp16 (bf16 works). In a loop of your own call
    `live.again(closure)` between backward and step.

    Example:
        >>> live = gv.wrap(model, gv.Sam(rho=0.05))
        >>> optimizer = torch.optim.SGD(live.param_groups(lr=0.1))
        >>> def closure():
        ...     outputs = model(x)
        ...     (F.cross_entropy(outputs, y) + live.loss(x, y, outputs)).backward()
        >>> closure()
        >>> live.again(closure)  # the gradient at the worst weights nearby
        >>> optimizer.step()
        >>> live.step_end()
    """

    name = "sam"
    stage = "objective"
    needs = frozenset({"gradients"})
    examples: ClassVar = ({}, {"rho": 0.5, "adaptive": True})

    rho: float = Field(
        default=0.05, gt=0, description="how far the worst weights are looked for; adaptive: ~1"
    )
    adaptive: bool = Field(
        default=False, description="weights may move in proportion to their size"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledSam(self, model)


class InstalledSam(Installed):
    """Sharpness-aware steps at work."""

    def __init__(self, request: Sam, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model

    def again(self, closure: Callable[[], None]) -> None:
        """Leave the gradients of the worst weights nearby; the weights are as before, to the bit.

        Where a gradient is not finite it is left as it is, for the loop to notice.
        """
        learning = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        gradients = {n: p.grad for n, p in learning.items() if p.grad is not None}
        if not gradients or not finite(gradients.values()):
            return
        before = {n: p.detach().clone() for n, p in learning.items()}
        with torch.no_grad():
            step = ascent(gradients, before, self.request.rho, self.request.adaptive)
            for name, parameter in learning.items():
                parameter.add_(step[name])
        try:
            with untracked_norms(self.model):
                closure()
        finally:
            with torch.no_grad():
                for name, parameter in learning.items():
                    parameter.copy_(before[name])
