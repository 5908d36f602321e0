"""Re-parameterisation: linear branches that train beside a layer's weight and fold into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from greenvis.core.surgery import find, names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, some
from greenvis.models.structure import View, view
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.reparam._kernels import average, centred, serial

Branch = Literal["1x1", "kx1", "1xk", "average", "serial", "small", "product"]


class Reparam(Technique):
    """Train linear branches beside each layer's weight, which fold into it afterwards: the plain
    network at the plain network's cost (RepVGG: Ding et al., 2021; DBB: Ding et al., 2021; OREPA:
    Hu et al., 2022).

    Costs training memory and little time, nothing at inference: after `merge` the layers have their
    own weights and names back. Saves nothing by itself: it is for accuracy at the same inference.
    Branches of a convolution: "1x1", "kx1" and "1xk" (its middle row and column), "average" (a
    pointwise convolution with an average behind it), "serial" (a pointwise one before a k×k one),
    "small" (a kernel of `small` positions in the middle of a larger one); of a Linear and of a
    pointwise convolution "product" (W₂W₁ beside W). As in OREPA they are added up as kernels before
    the layer runs, which is the same to rounding as to add up their outputs, for they stand before
    the layer's norm and have none of their own: RepVGG's and DBB's branches have, and train
    otherwise for it. All begin at zero.

    Example:
        >>> live = gv.wrap(resnet, gv.Reparam(branches=["1x1", "serial"]))
        >>> live.merge() is resnet
        True
    """

    name = "reparam"
    stage = "weights"
    order = 1
    needs = frozenset({"trainable_base"})
    examples = ({}, {"branches": ["1x1", "kx1", "1xk", "average", "serial", "small", "product"]})
    nothing = {"targets": ["no_such_layer"]}

    branches: list[Branch] = Field(
        default=["1x1", "average", "serial", "product"],
        min_length=1,
        description="which branches, where a layer can have them",
    )
    small: int = Field(default=3, ge=2, description="side of the small kernel")
    rank: int | None = Field(
        default=None,
        ge=1,
        description="width in the middle of product and serial; default a quarter of the narrower",
    )
    targets: list[str] | None = Field(
        default=None,
        description="shell patterns on layers' paths; default all but the classifier's",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put branches beside weights. Raises BadInput for a model without layers for them."""
        structure = view(model, self.input_shape, probe=False)
        layers = self._layers(model, structure)
        kernels = {
            path: kernel
            for path, (module, name) in layers.items()
            if (kernel := self._kernel(module, getattr(module, name))).count
        }
        if not kernels:
            raise BadInput(
                f"{type(model).__name__} has no layer for {some(self.branches)}"
                + ("" if self.targets is None else f" among {some(self.targets)}")
                + ": convolutions of more than one position take all but product, Linears and "
                "pointwise convolutions product alone"
            )
        folds = []
        for path, kernel in kernels.items():
            module, name = layers[path]
            weight = getattr(module, name)
            kernel.train(module.training)
            parametrize.register_parametrization(module, name, kernel)
            folds.append((weight, kernel))
        added = [p for kernel in kernels.values() for p in kernel.parameters()]
        check_runs(model, structure.example, added, "branches")
        return InstalledReparam(folds, names_of(model, added))

    def _layers(self, model: nn.Module, structure: View) -> dict[str, tuple[nn.Module, str]]:
        """Return modules with the name of their weight, by path."""
        paths = [*structure.convs, *structure.linears]
        paths = [p for p in dict.fromkeys(paths) if not structure.in_classifier(p)]
        if self.targets is not None:
            chosen = find(model, self.targets, nn.Module)
            paths = [p for p in [*structure.convs, *structure.linears] if p in chosen]
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        out: dict[str, tuple[nn.Module, str]] = {}
        for path in dict.fromkeys(paths):
            module = model.get_submodule(path)
            known = isinstance(module, (nn.Linear, _ConvNd))
            if not known or isinstance(module, _ConvTransposeNd):
                continue
            weight = module._parameters.get("weight")
            if weight is None or parametrize.is_parametrized(module) or uses[id(weight)] > 1:
                continue
            out[path] = module, "weight"
        for attention in structure.attention:
            module = model.get_submodule(attention.path)
            joint = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
            if joint and self.targets is None:
                out[f"{attention.path}.in_proj_weight"] = module, "in_proj_weight"
        return out

    def _kernel(self, module: nn.Module, weight: Tensor) -> Branches:
        pointwise = all(side == 1 for side in weight.shape[2:])
        possible: dict[str, bool] = {
            "product": pointwise,
            "1x1": not pointwise,
            "average": not pointwise,
            "serial": not pointwise,
            "kx1": weight.dim() == 4 and min(weight.shape[2:]) > 1,
            "1xk": weight.dim() == 4 and min(weight.shape[2:]) > 1,
            "small": not pointwise and all(side > self.small for side in weight.shape[2:]),
        }
        branches = [b for b in dict.fromkeys(self.branches) if possible[b]]
        return Branches(weight, getattr(module, "groups", 1), branches, self.rank, self.small)


class Branches(nn.Module):
    """What is added to a weight, as a parametrisation of it.

    Args:
        weight: (out, in / groups, *sides).
        groups: Of the layer.
        branches: Which.
        rank: The width in the middle of product and serial, per group.
        small: The side of the small kernel.
    """

    def __init__(
        self, weight: Tensor, groups: int, branches: Sequence[str], rank: int | None, small: int
    ) -> None:
        super().__init__()
        self.groups, self.sides = groups, tuple(weight.shape[2:])
        out, width = weight.shape[:2]
        ones = [1] * len(self.sides)
        middle = rank or max(1, min(out // groups, width) // 4)
        shapes = {
            "1x1": (out, width, *ones),
            "average": (out, width, *ones),
            "small": (out, width, *[small for _ in ones]),
            "product": (out, middle, *ones),
            "serial": (out, middle, *self.sides),
        }
        if len(self.sides) == 2:
            shapes |= {"kx1": (out, width, self.sides[0], 1), "1xk": (out, width, 1, self.sides[1])}
        self.zeros = nn.ParameterDict(
            {_key(b): nn.Parameter(weight.detach().new_zeros(shapes[b])) for b in branches}
        )
        first = {b: weight.detach().new_empty(groups * middle, width, *ones) for b in branches
                 if b in ("product", "serial")}  # fmt: skip
        for tensor in first.values():
            nn.init.normal_(tensor, std=width**-0.5)
        self.first = nn.ParameterDict({_key(b): nn.Parameter(t) for b, t in first.items()})

    @property
    def count(self) -> int:
        """How many branches there are."""
        return len(self.zeros)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with all branches added."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.change()

    def change(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return what is added.

        Args:
            dtype: To compute in; the branches' own where None.

        Returns:
            Of the weight's shape.
        """
        total: Tensor | None = None
        for key, parameter in self.zeros.items():
            branch = key.removeprefix("_")
            kernel = parameter if dtype is None else parameter.detach().to(dtype)
            if branch in ("product", "serial"):
                first = self.first[key]
                first = first if dtype is None else first.detach().to(dtype)
                kernel = serial(first, kernel, self.groups)
            elif branch == "average":
                kernel = average(kernel, self.sides)
            else:
                kernel = centred(kernel, self.sides)
            total = kernel if total is None else total + kernel
        assert total is not None
        return total


def _key(branch: str) -> str:
    return f"_{branch}"  # a name may not begin with a digit


class InstalledReparam(Installed):
    """Branches in a live model. folds: each weight, with what is added to it."""

    def __init__(
        self, folds: Sequence[tuple[nn.Parameter, Branches]], trainable: tuple[str, ...]
    ) -> None:
        super().__init__(trainable)
        self.folds = [*folds]

    def facts(self) -> Mapping[str, Any]:
        """Return how many branches train, in how many layers."""
        return {
            "reparam": {"layers": len(self.folds), "branches": sum(b.count for _, b in self.folds)}
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Add the branches to the weights, in double precision where the device has it."""
        for weight, branches in self.folds:
            wide = torch.float32 if weight.device.type == "mps" else torch.float64
            weight.copy_(weight.to(wide) + branches.change(wide))
