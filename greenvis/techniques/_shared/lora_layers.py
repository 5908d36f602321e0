"""PEFT's LoRA layers where they need help: weights that others read, whole attentions, torch's fast
path, exact merges."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.func import functional_call

from greenvis.techniques._shared.attach import precise

NAME = "default"  # of the one adapter PEFT holds


class ReadLinear(peft_layers.Linear):
    """A LoRA Linear whose weight another module reads (torchvision's Swin, BEiT): the weight it
    shows holds the change."""

    @property
    def weight(self) -> Tensor:
        """The base's weight with the change added, (out, in)."""
        layer: Any = self.get_base_layer()
        return layer.weight + self.get_delta_weight(NAME).to(layer.weight.dtype)


class Multihead(peft_layers.MultiheadAttention):
    """PEFT's LoRA of nn.MultiheadAttention, run on changed weights without touching the base.

    PEFT adds the change to the base and takes it off again at each forward, which lets the frozen
    weights drift by rounding and replaces the parameter objects; here the sum exists for the call
    only.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend as nn.MultiheadAttention does, same arguments, with the changed weights."""
        base: Any = self.get_base_layer()
        inputs, out = base.in_proj_weight, base.out_proj.get_base_layer().weight
        weights = {
            "in_proj_weight": inputs + self.get_delta_weight(NAME).to(inputs.dtype),
            "out_proj.base_layer.weight": out + base.out_proj.get_delta_weight(NAME).to(out.dtype),
        }
        return functional_call(base, weights, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """Nothing to restore: the parameters never leave the base."""


def keep_off_the_fast_path(model: nn.Module, layers: dict[str, Any]) -> None:
    """In eval nn.TransformerEncoderLayer reads its parts' own weights, and would miss the change;
    not where there are hooks."""
    fused = [p for p, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for path, layer in layers.items():
        if any(path.startswith(f"{p}.") or not p for p in fused):
            layer.register_forward_hook(_nothing)


def _nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    return None


def merged(layer: Any) -> Tensor:
    """Return the weight with the change folded in by PEFT, in fp32 or better; `layer` stays as it
    is."""
    layer = copy.deepcopy(layer)
    layer.to(precise(layer.base_layer.weight))
    layer.merge(safe_merge=True)
    return layer.base_layer.weight.detach()


def put_folded(model: nn.Module, folded: Mapping[str, Tensor]) -> None:
    """Put folded weights, by name, in the place of the model's own; a model of lower precision
    becomes float32, so that nothing is lost."""
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        _to_float32(model)
    for name, weight in folded.items():
        parent, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(weight, model.get_parameter(name).requires_grad)
        model.get_submodule(parent)._parameters[leaf] = parameter


def _to_float32(model: nn.Module) -> None:
    """Replace every tensor of lower precision, leaving the old ones as they are for `undo`."""
    done: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype.itemsize >= 4:
                    continue
                if id(tensor) not in done:
                    new = tensor.detach().float()
                    done[id(tensor)] = (
                        nn.Parameter(new, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else new
                    )
                tensors[name] = done[id(tensor)]


def inner_linears(model: nn.Module) -> dict[str, str]:
    """Return the Linears inside nn.MultiheadAttention, each with the attention's path."""
    wholes = [p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return {f"{w}.out_proj" if w else "out_proj": w for w in wholes}
