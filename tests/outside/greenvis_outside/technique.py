"""A technique from outside with a layer of its own: all a third party has to write."""

from typing import Any, ClassVar

import torch
from torch import nn

from greenvis import Installed, Technique
from greenvis.core import surgery


class Gain(Technique):
    """Learn a factor for each output of the last linear layer; adds the term "gain", which draws
    the factors towards 1. Costs one multiplication for each output, and none once merged."""

    name: ClassVar[str] = "gain"
    stage: ClassVar[Any] = "weights"
    weight: float = 0.1

    def install(self, model: nn.Module) -> Installed:
        """Put the layer behind the last linear one. Raises BadInput where there is none."""
        linear = model.get_submodule(surgery.find(model, ["*"])[-1])
        assert isinstance(linear, nn.Linear)
        layer = GainLayer(linear)
        linear.gain = layer
        linear.register_forward_hook(layer.scaled)
        return _Live(linear, layer, self.weight, surgery.names_of(model, layer.parameters()))


class GainLayer(nn.Module):
    """Multiply each output by a factor that begins at 1."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones_like(linear.weight[:, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (batch, …, outputs), scaled."""
        return x * self.factor

    @staticmethod
    def scaled(linear: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """The hook: whichever copy of the layer this linear one has is run."""
        return linear.get_submodule("gain")(output)


class _Live(Installed):
    def __init__(
        self, linear: nn.Linear, layer: GainLayer, weight: float, names: tuple[str, ...]
    ) -> None:
        super().__init__(names)
        self.linear, self.layer, self.weight = linear, layer, weight

    def terms(self, x: Any, y: Any, logits: Any) -> dict[str, torch.Tensor]:
        return {"gain": self.weight * (self.layer.factor - 1).square().mean()}

    def merge(self) -> None:
        with torch.no_grad():
            factor = self.layer.factor.float()
            self.linear.weight.copy_(self.linear.weight.float() * factor[:, None])
            if self.linear.bias is not None:
                self.linear.bias.copy_(self.linear.bias.float() * factor)
