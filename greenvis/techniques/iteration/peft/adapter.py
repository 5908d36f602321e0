"""Adapters: freeze the model, learn small bottlenecks beside or behind its parts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import mark_skippable
from greenvis.core.technique import Classifier, InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import View, view
from greenvis.tasks.answers import ALL_BUT_VQA
from greenvis.techniques._shared.attach import (
    check_runs,
    first,
    like,
    patches_matter,
    seat,
    train_only,
    with_first,
)
from greenvis.techniques._shared.bottleneck import Bottleneck, ConvBottleneck, Grid, Mona

Variant = Literal["houlsby", "adaptformer", "conv", "mona"]
_CHILD = "adapter"


class Adapter(Technique):
    """Learn small bottlenecks in a frozen model: behind attention and MLP (Houlsby et al., 2019),
    beside the MLP (AdaptFormer: Chen et al., 2022), convolutional behind each block, or with Mona's
    filters (Yin et al., 2025).

    Saves optimizer memory and storage per task (the delta), and the backward below the first
    adapted block. Costs a few per cent of inference, for good: adapters are not linear, so nothing
    merges. A fresh adapter changes nothing.
    "houlsby" adapts the outputs of attention and MLP before they join the stream; "adaptformer"
    adds scale · bottleneck of the MLP's normalised input to its output; "conv" and "mona" adapt
    each block's output, as maps or as the grid of its tokens without the prefix tokens (the paper's
    Mona stands behind attention too); not behind the last block where only the class token is read
    there. The classifier trains in full. Dropout and stochastic depth of the frozen part stay as
    `model.train()` sets them; its batch norms are held.

    Example:
        >>> live = gv.wrap(model, gv.Adapter(width=4))
        >>> print(live.summary())
        VisionTransformer with adapter
          adapter: {'width': 4}
          trains 1,333 of 33,557 parameters (3.97%); delta 0.01 MB
    """

    name = "adapter"
    tasks = ALL_BUT_VQA
    instead = "lora tunes such a model"
    only_with = {"kernel_size": ("variant", ("conv",))}
    stage = "weights"
    order = 1
    examples = (
        {"width": 4},
        {"width": 4, "variant": "adaptformer"},
        {"width": 4, "variant": "conv", "head": "freeze"},
        {"width": 4, "variant": "mona", "blocks": 2},
    )
    nothing = {"blocks": 100_000}

    variant: Variant = Field(default="houlsby", description="which bottleneck, and where")
    width: int = Field(default=64, ge=1, description="channels inside the bottleneck")
    scale: float | None = Field(
        default=None,
        gt=0,
        description="factor s on its output; default 0.1 for adaptformer, else 1",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside the bottleneck")
    kernel_size: Literal[1, 3, 5, 7] = Field(
        default=3, description="side of conv's depthwise filter"
    )
    blocks: int | None = Field(
        default=None, ge=1, description="adapt the last so many blocks only; default all"
    )
    head: Classifier = "train"
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put adapters at their places. Raises BadInput for a model without such places, or with
        fewer blocks."""
        structure = view(model, self.input_shape, probe=False)
        grid = Grid(tuple(structure.example.shape))
        targets = self._targets(model, structure, grid)
        last = next(reversed(targets))
        if self.variant in ("conv", "mona") and not patches_matter(model, structure, last):
            del targets[last]
            if not targets:
                raise BadInput(
                    f"behind '{last}' only the prefix token is read, so {self.variant} adapters do "
                    "nothing; raise blocks"
                )
        kind = like(model)
        added: list[nn.Parameter] = []
        for path, inputs in targets.items():
            layout = structure.layouts[path]
            net = self._net(layout.width, layout.channels, kind)
            if self.variant in ("conv", "mona"):
                _Behind(net, layout.channels, grid, structure.prefix_tokens).put(model, path)
            elif inputs is None:
                _Behind(net, layout.channels).put(model, path)
            else:
                _Beside(net).put(model, path, inputs)
            added += net.parameters()
        if self.variant in ("conv", "mona"):
            model.register_forward_pre_hook(grid.watch, with_kwargs=True)
            for path in structure.convs[:1]:  # which every door leads through
                model.get_submodule(path).register_forward_pre_hook(
                    mark_skippable(partial(grid.watch)), with_kwargs=True
                )
        check_runs(model, structure.example, added, f"{self.variant} adapters")
        live = Installed(train_only(model, added, structure, self.head), freezes=True)
        live.unmergeable = (
            "an adapter is a non-linear network of its own, not a change of weights; keep the "
            "model wrapped"
        )
        return live

    def _targets(self, model: nn.Module, structure: View, grid: Grid) -> dict[str, str | None]:
        """Return where outputs are adapted, each with the layer whose input is read (None: the
        output itself)."""
        if self.variant in ("conv", "mona"):
            fits = {p: None for p in structure.role("block") if _is_grid(structure, grid, p)}
            missing = "blocks that give maps, or tokens in a grid"
        elif self.variant == "adaptformer":
            fits = {m.down: m.up for m in structure.mlps if _widths_agree(structure, m.up, m.down)}
            missing = "MLPs of two layers that it calls itself"
        else:
            pairs = [(a.out, a.path) for a in structure.attention] + [
                (m.down, m.path) for m in structure.mlps
            ]
            fits = {
                p: None for p in (_callable(structure, *pair) for pair in pairs) if p is not None
            }
            missing = "attention or MLPs"
        fits = {
            p: i for p, i in fits.items() if p in structure.layouts and seat(model, p) is not None
        }
        if not fits:
            other = ""
            if self.variant in ("houlsby", "adaptformer") and structure.blocks:
                other = "; variant: conv adapts blocks"
            raise BadInput(
                f"{self.variant} adapters need {missing}, which {type(model).__name__} does not "
                f"show{other}"
            )
        if self.blocks is None:
            return fits
        if self.blocks > len(structure.blocks):
            raise BadInput(
                f"blocks is {self.blocks}, but {type(model).__name__} has {len(structure.blocks)}: "
                "give no more"
            )
        last = structure.blocks[-self.blocks :]
        chosen = {
            p: i for p, i in fits.items() if any(p == b or p.startswith(b + ".") for b in last)
        }
        if not chosen:
            raise BadInput(
                f"none of the last {self.blocks} blocks has a place for {self.variant} adapters; "
                "raise blocks"
            )
        return chosen

    def _net(self, channels: int, axis: int, kind: dict[str, Any]) -> nn.Module:
        more: dict[str, Any] = {
            "scale": self.scale or (0.1 if self.variant == "adaptformer" else 1.0),
            "dropout": self.dropout,
        }
        match self.variant:
            case "conv":
                return ConvBottleneck(
                    channels, self.width, kernel_size=self.kernel_size, **more, **kind
                )
            case "mona":
                return Mona(channels, self.width, **more, **kind)
            case "adaptformer":
                return Bottleneck(channels, self.width, nn.ReLU(), axis=axis, **more, **kind)
            case _:
                return Bottleneck(channels, self.width, nn.GELU(), axis=axis, **more, **kind)


class _Behind(nn.Module):
    """Adds a network of a part's output to that output; with a grid, of its map."""

    def __init__(
        self, net: nn.Module, axis: int, grid: Grid | None = None, prefix: int = 0
    ) -> None:
        super().__init__()
        self.net, self.axis, self.grid, self.prefix = net, axis, grid, prefix

    def put(self, model: nn.Module, path: str) -> None:
        _hold(seat(model, path), self).register_forward_hook(self.after)

    def forward(self, x: Any) -> Any:
        """Return x as it is: some parts run every module they hold."""
        return x

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the adapted output."""
        x = first(output)
        if self.grid is None:
            return with_first(output, x + self.net(x))
        change = self.net(self.grid.split(x, self.axis, self.prefix))
        return with_first(output, self.grid.add(x, change, self.axis, self.prefix))


class _Beside(nn.Module):
    """Adds a network of one layer's input to a later layer's output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.input: Tensor | None = None

    def put(self, model: nn.Module, path: str, inputs: str) -> None:
        _hold(model.get_submodule(path), self).register_forward_hook(self.after)
        model.get_submodule(inputs).register_forward_pre_hook(self.before)

    def before(self, module: nn.Module, args: Any) -> None:
        """Keep the input until the output is there."""
        self.input = args[0]

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return the output with the parallel branch added."""
        x, self.input = self.input, None
        assert x is not None
        return output + self.net(x)


def _hold(module: nn.Module | None, child: nn.Module) -> nn.Module:
    """Make `child` a part of `module`, under a name that is free."""
    assert module is not None
    name = _CHILD
    while hasattr(module, name):
        name += "_"
    module.add_module(name, child.train(module.training))
    return module


def _callable(structure: View, layer: str | None, owner: str) -> str | None:
    """Return the layer, or its owner where the layer's weight is read and the layer never runs."""
    return layer if layer and layer not in structure.functional else owner or None


def _widths_agree(structure: View, up: str, down: str) -> bool:
    one, other = structure.layouts.get(up), structure.layouts.get(down)
    return one is not None and other is not None and one.inputs == other.output


def _is_grid(structure: View, grid: Grid, path: str) -> bool:
    layout = structure.layouts.get(path)
    if layout is None:
        return False
    tokens = len(layout.output) == 3
    return len(layout.output) == 4 or (
        tokens and grid.size(layout.output[1] - structure.prefix_tokens) is not None
    )
