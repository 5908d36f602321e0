"""What techniques for streams of tasks share: parameters of which a part is frozen, whatever
optimizer steps on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenElements:
    """One parameter and which of its elements are frozen, as `frozen` says: no gradient reaches
    them, and `hold` undoes what decay or momentum did to them.

    Attributes:
        values: what frozen elements are held at.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.values = parameter.detach().clone()
        parameter.requires_grad_()  # else it takes no hook; `wrap` decides in the end who learns
        self.hook = parameter.register_hook(lambda grad: grad.masked_fill(self.frozen(), 0.0))

    def frozen(self) -> Tensor:
        """Return which elements do not learn now: bool, of the parameter's shape or broadcast to
        it, on its device."""
        raise NotImplementedError

    @torch.no_grad()
    def hold(self) -> None:
        """Put frozen elements back to their values."""
        self.values = self.values.to(self.parameter.device)
        self.parameter.copy_(torch.where(self.frozen(), self.values, self.parameter))

    @torch.no_grad()
    def take(self) -> None:
        """From now on, hold what the parameter has now."""
        self.values = self.parameter.detach().clone()


class Mask(FrozenElements):
    """A parameter with a mask of frozen elements, nothing at first."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__(parameter)
        self.mask = torch.zeros((), dtype=torch.bool)

    def frozen(self) -> Tensor:
        """Return the mask."""
        self.mask = self.mask.to(self.parameter.device)
        return self.mask
