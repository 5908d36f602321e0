"""Gates on the hidden units of MLPs, and which MLPs have units that can be gated."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.parts import Mlp
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import precise


class Gate(nn.Module):
    """The gates of one MLP's hidden units, living in the layer that reads them.

    Attributes:
        embedding: (units,).
        used: by ended tasks, bool (units,).
        s: how steep gates are in training.
        override: open units (0 or 1) of the task that a test names.
    """

    used: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        units = weight.shape[1]
        # what compensates its gradient overflows in half
        start = torch.empty(units, dtype=precise(weight), device=weight.device)
        self.embedding = nn.Parameter(start)
        self.register_buffer("used", torch.zeros(units, dtype=torch.bool, device=weight.device))
        self.s = 1.0
        self.override: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Draw new embeddings, all gates open."""
        nn.init.uniform_(self.embedding, 0.0, 2.0)

    def values(self) -> Tensor:
        """Return the gates (units,), 0 to 1; in eval 0 or 1."""
        if self.override is not None:
            return self.override.to(self.embedding)
        if self.training:
            return torch.sigmoid(self.s * self.embedding)
        return (self.embedding > 0).to(self.embedding)

    def shut(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the layer's arguments, hidden units (…, units) gated."""
        return (args[0] * self.values().to(args[0].dtype), *args[1:])


def gated_mlps(model: nn.Module, structure: View) -> list[Mlp]:
    """Return the MLPs whose hidden units can be gated. Raises BadInput where there is none."""
    what = type(model).__name__
    if not structure.mlps:
        raise BadInput(
            f"hat gates the hidden units of MLPs, and {what} has none; packnet takes any layer"
        )
    fit = [mlp for mlp in structure.mlps if _fits(model, structure, mlp)]
    if not fit:
        raise BadInput(
            f"no MLP of {what} has hidden units that can be gated one by one "
            f"('{structure.mlps[0].path}' mixes them)"
        )
    return fit


def _fits(model: nn.Module, structure: View, mlp: Mlp) -> bool:
    """Whether what enters `down` depends, unit by unit, on what leaves `up` (and `gate`): no norm
    or the like in between."""
    ups = [mlp.up, *([mlp.gate] if mlp.gate else [])]
    layers = [model.get_submodule(p) for p in (*ups, mlp.down)]
    if not all(isinstance(m, nn.Linear) for m in layers) or {*ups, mlp.down} & {
        *structure.functional,
        *structure.computed,
    }:
        return False
    units = layers[-1].in_features
    if any(m.out_features != units for m in layers[:-1]):  # halves of one layer, say
        return False
    if structure.example.device.type == "meta":
        return True
    inputs: list[Tensor] = []
    for changed in (False, True):
        hooks = [layers[-1].register_forward_pre_hook(partial(_note, inputs))]
        hooks += [m.register_forward_hook(_disturb) for m in layers[:-1]] if changed else []
        with removing(hooks), probing(model):
            model(structure.example)
    return torch.equal(inputs[0][..., 1:], inputs[-1][..., 1:])


def _note(inputs: list[Tensor], module: nn.Module, args: Any) -> None:
    inputs.append(args[0].clone())


def _disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.cat([output[..., :1] + 1, output[..., 1:]], -1)
