"""RF-Next: which dilation each convolution should have is searched while the network trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from greenvis.core.attached import attach_settings
from greenvis.core.surgery import find, names_of, replace
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.models.structure import View, view
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.structure._dilations import (
    START,
    Branches,
    Rate,
    estimate,
    expand,
    merged_kernel,
    sites,
)


class RFNext(Technique):
    """Search the dilation of each convolution while the network trains, so that what a layer sees
    fits the data at no cost of inference (RF-Next: Gao et al., 2023, local search).

    Each convolution runs at `branches` rates around its own, D - Δ to D + Δ, with one shared
    weight: y = Σ α_i conv(x, d_i), α = |w| / Σ|w| (eq. 5). Every `every` epochs D becomes Σ α_i d_i
    (eq. 6) and new rates are laid around it, at least 1 apart, so that small rates move, too; after
    `epochs` the search is over. `single` then goes on with one plain convolution per layer, of the
    dilation that was found, and merges into it: the same MACs and the same weights' names as
    before. `multi` keeps the branches, at their number times the layer's time.
    Costs `branches` times the convolutions' time as long as it searches; saves nothing by itself:
    it is for accuracy at equal inference, and did not show any over hand-made rates in four epochs
    of a small network, at 1.7 times the training energy (reports/structure-rfnext). Dilated
    depthwise kernels may lose a library's fast path.
    The global search comes before that, in a recipe: `search: {trials: 24}` of the arm tries powers
    of two on all layers at once by short trainings, and the local one begins with the best of them
    (`branches: 1` leaves it out).
    Padding follows the rate; so does what pads or cuts around a causal convolution along one axis.

    Example:
        >>> live = gv.wrap(resnet, gv.RFNext(epochs=1, every=1))
        >>> live.epoch_end()
        >>> live.facts()["dilations"]["layer2.0.conv2"]
        [[2, 2]]
    """

    name = "rfnext"
    stage = "base"
    order = 1
    needs = frozenset({"trainable_base"})
    only_with = {"fold": ("mode", ("multi",))}
    examples = (
        {"epochs": 1, "every": 1},
        {},
        {"branches": 2, "mode": "multi", "epochs": 1, "every": 1, "fold": True},
    )
    neutral = {"branches": 1}
    nothing = {"targets": ["no_such_convolution"]}

    mode: Literal["single", "multi"] = Field(
        default="single", description="end with one dilation per layer, or with all its branches"
    )
    branches: int = Field(default=3, ge=1, description="rates S tried at once")
    spread: float = Field(default=0.1, ge=0, description="Δ as a share of the dilation")
    epochs: int = Field(default=30, ge=1, description="epochs of search")
    every: int = Field(default=3, ge=1, description="epochs between its steps")
    most: int = Field(default=1024, ge=1, description="the largest dilation")
    fold: bool = Field(
        default=False,
        description="merge the branches of multi into one larger kernel; it takes longer than they",
    )
    targets: list[str] | None = Field(
        default=None,
        description="shell patterns on convolutions' paths; default all but patch embedding and "
        "classifier",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put branches in place of convolutions. Raises BadInput for a model without any whose
        dilation can change."""
        if self.every > self.epochs:
            raise BadInput(
                f"every is {self.every} and epochs {self.epochs}: the search would take no step; "
                "raise epochs"
            )
        structure = view(model, self.input_shape, probe=False)
        layers = self._layers(model, structure)
        before = {id(p) for p in model.parameters()}
        for path, layer in layers.items():
            layer.rates = self.candidates(layer, layer.rates[0])
            replace(model, layer.conv, layer.train(model.get_submodule(path).training))
        added = [p for p in model.parameters() if id(p) not in before]
        check_runs(model, structure.example, added, "dilated branches")
        if self.branches == 1:  # one share, which is always 1
            for weight in added:
                weight.requires_grad_(False)
            added = []
        return InstalledRFNext(self, model, layers, names_of(model, added))

    def _layers(self, model: nn.Module, structure: View) -> dict[str, Branches]:
        fit = [
            path
            for path in structure.convs
            if path not in structure.functional and _searchable(model.get_submodule(path))
        ]
        if self.targets is None:
            paths = [
                p for p in fit if p != structure.patch_embed and not structure.in_classifier(p)
            ]
        else:
            chosen = find(model, self.targets, nn.Module)
            paths = [p for p in fit if p in chosen]
        layers = {}
        for site in sites(model, paths, structure.example):
            conv: Any = model.get_submodule(site.path)
            odd = all(k % 2 for k in conv.kernel_size)
            if (site.causal or odd) and any(size > 1 for size in site.size):
                layers[site.path] = Branches(conv, site, self.branches)
        if not layers:
            raise BadInput(
                f"{type(model).__name__} has no convolution whose dilation can be searched (a "
                "kernel of more than one position and of odd sides, behind the patch embedding)"
                + ("" if self.targets is None else f" among {some(self.targets)}")
            )
        return layers

    def caps(self, layer: Branches) -> Rate:
        """Return the largest rate along each axis with a kernel of more than one position."""
        return _searched(layer, tuple(min(self.most, max(1, n - 1)) for n in layer.site.size))

    def candidates(self, layer: Branches, rate: Rate) -> list[Rate]:
        """Return the rates to try around one.

        Args:
            layer: The convolution.
            rate: One entry per axis.

        Returns:
            At most `branches` rates, none beyond the map; an axis with a kernel of 1 keeps its own.
        """
        conv: Any = layer.conv
        caps = [min(self.most, max(1, size - 1)) for size in layer.site.size]
        out = [
            tuple(
                own if k == 1 else max(1, min(cap, value))
                for value, own, k, cap in zip(
                    one, conv.dilation, conv.kernel_size, caps, strict=True
                )
            )
            for one in expand(rate, self.spread, self.branches, gap=1)
        ]
        return [*dict.fromkeys(out)]


class InstalledRFNext(Installed):
    """Branches in a live model. layers: by the path of the convolution."""

    def __init__(
        self,
        request: RFNext,
        model: nn.Module,
        layers: Mapping[str, Branches],
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable)
        self.request, self.model, self.layers = request, model, {**layers}
        self.ended = 0  # epochs
        self.tried = False  # whether its rates are those of a trial, which stay
        self._say_mergeable()

    @property
    def searching(self) -> bool:
        """Whether the search has steps before it."""
        request = self.request
        steps = request.epochs // request.every
        return request.branches > 1 and self.ended < steps * request.every

    def epoch_end(self) -> None:
        """Take a step of the search where one is due."""
        if not self.searching or self.tried:
            return
        self.ended += 1
        if self.ended % self.request.every:
            return
        over = not self.searching and self.request.mode == "single"
        for layer in self.layers.values():
            rate = estimate(layer.rates, layer.weights[: len(layer.rates)])
            layer.rates = [rate] if over else self.request.candidates(layer, rate)
            with torch.no_grad():
                layer.weights.fill_(START)
        self._say_mergeable()

    def _say_mergeable(self) -> None:
        if self.searching:
            self.unmergeable = (
                f"its search is under way ({self.ended} of {self.request.epochs} epochs have "
                "ended): train on, or lower epochs"
            )
        elif self.request.mode == "multi" and self.request.branches > 1 and not self.request.fold:
            self.unmergeable = (
                "it keeps its branches, which together are a larger kernel that takes longer than "
                "they (fold: true merges into that)"
            )
        else:
            self.unmergeable = ""

    def choices(self) -> Mapping[str, Sequence[int]]:
        """Return the powers of two that each convolution's dilation may be."""
        caps = {path: min(self.request.caps(layer)) for path, layer in self.layers.items()}
        return {path: [2**i for i in range(cap.bit_length())] for path, cap in caps.items()}

    def chosen(self) -> Mapping[str, int]:
        """Return the dilations, along the first axis that has one."""
        return {path: _searched(layer, layer.rates[0])[0] for path, layer in self.layers.items()}

    def choose(self, values: Mapping[str, int], trial: bool) -> None:
        """Set each convolution's dilation; the local search stands still in a trial, and begins
        there else."""
        self.tried, self.ended = trial, 0
        for path, value in values.items():
            layer = self.layers[path]
            conv: Any = layer.conv
            axes = zip(conv.kernel_size, conv.dilation, strict=True)
            rate = tuple(own if k == 1 else value for k, own in axes)
            layer.rates = [rate] if trial else self.request.candidates(layer, rate)
            layer.weights.requires_grad_(len(layer.rates) > 1)
            with torch.no_grad():
                layer.weights.fill_(START)
        self._say_mergeable()

    def facts(self) -> Mapping[str, Any]:
        """Return the dilations by path of the convolution, one list per branch."""
        rates = {path: [[*rate] for rate in layer.rates] for path, layer in self.layers.items()}
        return {"dilations": rates}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rates, and how many epochs have ended."""
        rates = {f"rates.{path}": torch.tensor(layer.rates) for path, layer in self.layers.items()}
        return {"epochs": torch.tensor(self.ended), **rates}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned. Raises GreenvisError for rates of other layers."""
        names = {"epochs", *(f"rates.{path}" for path in self.layers)}
        if names != set(state):
            raise GreenvisError(
                f"this state has dilations of other layers: {some(sorted(names ^ set(state)))}"
            )
        self.ended = int(state["epochs"])
        for path, layer in self.layers.items():
            layer.rates = [tuple(rate) for rate in state[f"rates.{path}"].tolist()]
        self._say_mergeable()

    def merge(self) -> None:
        """Give the convolutions their dilations, which go into the model's file, or the larger
        kernels of their branches."""
        for layer in self.layers.values():
            if len(layer.rates) > 1:
                _fold(layer)
                continue
            attach_settings(self.model, layer.settled(layer.rates[0]))


def _searched(layer: Branches, rate: Rate) -> Rate:
    """Return the entries of a rate along axes with a kernel of more than one position."""
    conv: Any = layer.conv
    return tuple(value for value, k in zip(rate, conv.kernel_size, strict=True) if k > 1)


def _searchable(conv: Any) -> bool:
    known = isinstance(conv, _ConvNd) and not isinstance(conv, _ConvTransposeNd)
    return known and any(k > 1 for k in conv.kernel_size) and "forward" not in vars(conv)


def _fold(layer: Branches) -> None:
    """Give the convolution the one undilated kernel that equals its branches."""
    conv: Any = layer.conv
    largest = tuple(max(rate[axis] for rate in layer.rates) for axis in range(len(conv.dilation)))
    changes = layer.settled(largest)
    shares = layer.weights[: len(layer.rates)].detach()
    with torch.no_grad():
        kernel = merged_kernel(
            conv.weight.detach().double(), layer.rates, shares.double(), bool(layer.site.causal)
        )
        conv.weight = nn.Parameter(kernel.to(conv.weight.dtype), conv.weight.requires_grad)
    for module, values in changes.items():
        vars(module).update(values)
    conv.dilation = (1,) * len(largest)
    conv.kernel_size = tuple(conv.weight.shape[2:])
