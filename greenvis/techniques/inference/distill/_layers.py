"""Where distillation reads features: layers chosen by role, number or path, and taps on them that
never leak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.example import tensors_in
from greenvis.errors import BadInput, GreenvisError, nearest, some
from greenvis.models.structure import Attention, View
from greenvis.models.structure.layout import as_map
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.features import prefix_of
from greenvis.techniques._shared.rows import unmerge

T = TypeVar("T")
Part = Literal["output", "input", "q", "k", "v"]
Layers = str | int | tuple[str | int, ...]
PROJECTIONS: tuple[Part, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class TapPoint:
    """One tensor to read in each forward: a module's output or input, or the queries, keys or
    values of an attention.

    path: the module a tap sits on. channels: the axis of the channels, 1 or -1. prefix: class and
    register tokens, which are no patches; behind: whether they come after them. fused: the module's
    output holds queries, keys and values side by side.
    width: how many channels.
    """

    path: str
    part: Part = "output"
    channels: int = -1
    prefix: int = 0
    fused: bool = False
    width: int = 0
    behind: bool = False

    @property
    def key(self) -> str:
        """Name it in caches and messages."""
        return self.path if self.part == "output" else f"{self.path} ({self.part})"

    def read(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        """Return the tensor, of what went into the module and came out."""
        if self.part == "input":
            return next(tensors_in((args, kwargs)))
        if self.part == "output":
            return next(tensors_in(output))
        i = PROJECTIONS.index(self.part)
        if isinstance(module, nn.MultiheadAttention):
            taken = [*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)][i]
            bias = module.in_proj_bias.chunk(3)[i] if module.in_proj_bias is not None else None
            tokens = F.linear(taken, module.in_proj_weight.chunk(3)[i], bias)
            return tokens if module.batch_first else tokens.transpose(0, 1)
        tokens = next(tensors_in(output))
        return tokens.chunk(3, -1)[i] if self.fused else tokens

    def map(self, features: Tensor, aspect: float) -> Tensor:
        """Return what was read as a map (batch, channels, height, width), in float32. aspect:
        height / width of the image."""
        return as_map(self._prefix_first(features), self.channels, self.prefix, aspect).float()

    def tokens(self, features: Tensor, count: int) -> Tensor:
        """Return the first `count` class and register tokens as a map of one row (batch, channels,
        1, count), in float32."""
        return prefix_of(self._prefix_first(features), count)

    def _prefix_first(self, features: Tensor) -> Tensor:
        return features.roll(self.prefix, 1) if self.behind else features


class Taps:
    """Taps on points of one module; `take` gives what they read in the last forward, once, by key;
    merged tokens given back.

    learning: read only where gradients are recorded (a student, not its evaluation). A deep copy of
    the module has none of them, and nothing keeps a graph alive between steps.
    """

    def __init__(
        self, module: nn.Module, points: Sequence[TapPoint], learning: bool = False
    ) -> None:
        self.on, self.learning = True, learning
        self._model, self._outputs = module, dict[str, Tensor]()
        self._points = {p.key: p for p in points}
        self._hooks = [
            module.get_submodule(p.path).register_forward_hook(
                _Tap(self, p, module.get_submodule(p.path)), with_kwargs=True
            )
            for p in self._points.values()
        ]

    def read(self, point: TapPoint, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Note what a point holds in this forward."""
        if self.on and (torch.is_grad_enabled() or not self.learning):
            self._outputs[point.key] = unmerge(
                self._model, point.read(module, args, kwargs, output)
            )

    def peek(self, key: str) -> Tensor:
        """Return what was read at one point, and keep it."""
        if key not in self._outputs:
            raise GreenvisError(
                f"nothing was read at '{key}': it did not run, with gradients, since the last "
                "step; call the model before the loss, and each time"
            )
        return self._outputs[key]

    def take(self) -> dict[str, Tensor]:
        """Return all that was read and forget it."""
        outputs = {key: self.peek(key) for key in self._points}
        self._outputs.clear()
        return outputs

    def remove(self) -> None:
        """Take the taps off."""
        for hook in self._hooks:
            hook.remove()
        self._outputs.clear()


class _Tap:
    """The hook itself; copied along with its module, it does nothing."""

    def __init__(self, taps: Taps, point: TapPoint, module: nn.Module) -> None:
        self.taps, self.point, self.module = taps, point, module

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is self.module:
            self.taps.read(self.point, module, args, kwargs, output)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Be a hook that does nothing."""


def features(model: nn.Module, structure: View, layers: Layers) -> list[TapPoint]:
    """Return the points of layers.

    Args:
        model: to read.
        structure: its view.
        layers: "block" (all), "last" (block), "head" (the classifier's input), numbers of blocks,
            or paths.
    """
    chosen: dict[TapPoint, None] = {}
    per_sample = [
        b
        for b in structure.blocks
        if b in structure.layouts and structure.layouts[b].output[0] == len(structure.example)
    ]
    for layer in layers if isinstance(layers, tuple) else (layers,):
        if layer == "head":
            if not structure.heads:
                raise BadInput(
                    f"{type(model).__name__} shows no classifier, so there is no 'head' to read "
                    "before; name a layer"
                )
            chosen[TapPoint(structure.heads[0], "input")] = None
        else:
            for path in _paths(model, layer, per_sample, "block"):
                layout = structure.layouts.get(path)
                behind = structure.prefix_position == "behind"
                chosen[
                    TapPoint(
                        path,
                        "output",
                        layout.channels if layout else 0,
                        structure.prefix_tokens,
                        behind=behind,
                    )
                ] = None
    return _measured(model, structure, list(chosen))


def attentions(
    model: nn.Module, structure: View, layers: Layers
) -> list[tuple[Attention, dict[str, TapPoint]]]:
    """Return attentions with the points of their queries, keys and values.

    Raises:
        BadInput: where they cannot be read.
    """
    what = type(model).__name__
    if not structure.attention:
        raise BadInput(f"relations of tokens are read off attention, and {what} has none")
    if "windowed" in structure.flags:
        raise BadInput(
            f"{what} attends in windows, whose relations another model has not; distil features "
            "instead"
        )
    at = {a.path: a for a in structure.attention}
    out = []
    for layer in layers if isinstance(layers, tuple) else (layers,):
        for path in _paths(model, layer, tuple(at), "attention"):
            if path not in at:
                raise BadInput(f"'{path}' is no attention of {what}{nearest(path, at)}")
            one = at[path]
            if one.kind == "multihead":
                mha = model.get_submodule(path)
                if getattr(mha, "in_proj_weight", None) is None:
                    raise BadInput(
                        f"'{path}' of {what} takes keys and values of other widths; name another "
                        "attention"
                    )
                paths: dict[Part, str | None] = dict.fromkeys(PROJECTIONS, path)
            elif one.kind == "functional":
                raise BadInput(
                    f"'{path}' of {what} is computed by another module than its own; distil "
                    "features instead"
                )
            else:
                paths = {"q": one.qkv or one.q, "k": one.qkv or one.k, "v": one.qkv or one.v}
            if None in paths.values():
                raise BadInput(
                    f"'{path}' of {what} does not show its queries, keys and values; name another "
                    "attention"
                )
            behind = structure.prefix_position == "behind"
            points = [
                TapPoint(str(p), n, -1, structure.prefix_tokens, bool(one.qkv), behind=behind)
                for n, p in paths.items()
            ]
            out.append((one, {p.part: p for p in _measured(model, structure, points)}))
    return out


def thinned(items: Sequence[T], count: int) -> list[T]:
    """Return `count` of the items, evenly spaced, the last among them."""
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]


def _paths(model: nn.Module, layer: str | int, row: Sequence[str], what: str) -> list[str]:
    """Return the paths that a role, a number or a path means; `row`: those that numbers count."""
    name = type(model).__name__
    if isinstance(layer, int) or layer in ("block", "last"):
        if not row:
            raise BadInput(f"{name} shows no row of {what}s; name layers by their paths")
        if layer == "block":
            return list(row)
        number = -1 if layer == "last" else int(layer)
        if not -len(row) <= number < len(row):
            raise BadInput(f"{name} has {len(row)} {what}s, so there is no {what} {number}")
        return [row[number]]
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise BadInput(
            f"{name} has no layer '{layer}'{nearest(layer, modules)}; its {what}s are "
            f"{some(row) or 'not in a row'}"
        )
    return [layer]


def _measured(model: nn.Module, structure: View, points: Sequence[TapPoint]) -> list[TapPoint]:
    """Return the places with axis and number of their channels, as one forward on the view's
    example shows them."""
    taps = Taps(model, points)
    try:
        with probing(model):
            model(structure.example)
        shapes = {key: tuple(t.shape) for key, t in taps.take().items()}
    finally:
        taps.remove()
    out = []
    for point in points:
        shape = shapes[point.key]
        if len(shape) not in (2, 3, 4) or shape[0] != len(structure.example):
            raise BadInput(
                f"'{point.key}' of {type(model).__name__} gives {shape} for one image: neither a "
                "map, nor tokens, nor a vector of its own; name another layer"
            )
        axis = point.channels or (1 if len(shape) == 4 else -1)
        prefix = point.prefix if len(shape) == 3 else 0
        out.append(
            replace(
                point,
                channels=axis,
                prefix=prefix,
                width=shape[axis],
                behind=point.behind and prefix > 0,
            )
        )
    return out
