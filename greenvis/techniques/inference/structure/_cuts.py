"""What stays of a model's modules when units go: a plan of cuts, and putting it into effect."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.surgery import replace
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output

TOLERANCE = 1e-4  # of the greatest answer: a product of fewer columns rounds otherwise


@dataclass
class Cut:
    """What stays of one module.

    Args:
        tensors: By name of a parameter or buffer, the positions of what stays in the flattened
            tensor, int64 in its new shape.
        settings: By name of an attribute, its new value (out_features, num_heads).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


Plan = dict[str, Cut]  # by path of the module


@dataclass(frozen=True)
class Share:
    """What is taken out, and by which measure.

    Args:
        ratio: The share of units taken out, of each layer.
        parts: Of "channels", "heads", "neurons".
        importance: "magnitude" or "random".
        multiple_of: What the channels and neurons that stay are a multiple of.
        chosen: Paths that may lose units; None for all.
    """

    ratio: float
    parts: frozenset[str]
    importance: str
    multiple_of: int
    chosen: frozenset[str] | None = None

    def takes(self, path: str) -> bool:
        """Whether a layer or an attention may lose units."""
        return self.chosen is None or path in self.chosen


def removed(count: int, ratio: float, multiple_of: int = 1) -> int:
    """Return how many of `count` units go, so that one at least and a multiple stays."""
    stay = max(1, round(count * (1 - ratio)))
    if multiple_of > 1:
        stay = min(count, math.ceil(stay / multiple_of) * multiple_of)
    return count - stay


def taken(tensor: Tensor, positions: Tensor) -> Tensor:
    """Return what stays of a tensor, in its new shape."""
    return tensor.flatten()[positions.to(tensor.device).flatten()].view(positions.shape)


def smaller(module: nn.Module, cut: Cut) -> nn.Module:
    """Return a module like this one, with the same children and hooks, and what stays of its
    tensors."""
    new = copy.copy(module)
    for name, value in [*vars(new).items()]:
        if isinstance(value, (dict, set, list)):
            vars(new)[name] = copy.copy(value)
    for name, positions in cut.tensors.items():
        old: Any = getattr(module, name)
        value = taken(old.detach(), positions)
        if name in module._parameters:
            new._parameters[name] = nn.Parameter(value, old.requires_grad)
        else:
            new._buffers[name] = value
    vars(new).update(cut.settings)
    return new


def applied(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a smaller copy of a model."""
    copied = copy.deepcopy(model)
    for path, cut in plan.items():
        old = copied.get_submodule(path)
        replace(copied, old, smaller(old, cut))
    return copied


def within(wide: Plan, narrow: Plan) -> Plan | None:
    """Return a plan of less, in terms of what another left: positions among those that stay there.
    None where it keeps something that the other does not."""
    out: Plan = {}
    for path, cut in narrow.items():
        known = wide.get(path, Cut())
        tensors = {}
        for name, positions in cut.tensors.items():
            if name not in known.tensors:
                tensors[name] = positions
                continue
            base = known.tensors[name].flatten()
            at = torch.searchsorted(base, positions.flatten().contiguous()).clamp(max=len(base) - 1)
            if not torch.equal(base[at], positions.flatten()):
                return None
            tensors[name] = at.view(positions.shape)
        out[path] = Cut(tensors, cut.settings)
    return out


def same_answers(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether two models answer alike up to rounding."""
    with probing(model):
        one = main_output(model(x))
    with probing(other):
        two = main_output(other(x))
    limit = TOLERANCE * max(1e-6, float(one.abs().max()))
    return one.shape == two.shape and float((one - two).abs().max()) <= limit


def sizes(model: nn.Module, plan: Mapping[str, Cut]) -> dict[str, tuple[int, ...]]:
    """Return the length of each smaller tensor along each axis, 0 where that is as before, by name.

    Args:
        model: As it was before.
        plan: What stays of it.
    """
    out = {}
    for path, cut in plan.items():
        for name, positions in cut.tensors.items():
            before = getattr(model.get_submodule(path), name).shape
            pairs = zip(positions.shape, before, strict=True)
            full = f"{path}.{name}" if path else name
            out[full] = tuple(0 if now == was else now for now, was in pairs)
    return out
