"""Where the keys (and queries) of an attention can be read: found by value, so that it holds
whatever a library calls them.

One forward shows which part of the attention gives the very keys that
`scaled_dot_product_attention` is called with: a norm on them, their projection, or a fused one,
with or without a low-rank change around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from greenvis.core.modes import removing
from greenvis.core.surgery import mark_skippable
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.blocks import Block, main

Layout = Literal["fused", "flat", "heads first", "heads last", "packed"]
Which = Literal["query", "key"]


@dataclass(frozen=True)
class Source:
    """Where queries or keys are read: in the output of the module `path`, laid out as `layout`
    says.

    "fused": (batch, length, 3·heads·dim); "flat": (batch, length, heads·dim); "heads first":
    (batch, heads, length, dim); "heads last": (batch, length, heads, dim). "packed": computed from
    the module's input, by in_proj_weight or qkv.weight.
    """

    path: str
    which: Which
    layout: Layout
    heads: int

    def read(self, module: nn.Module, value: Tensor) -> Tensor:
        """Return (batch, length, heads, dim) from the module's output ("packed": from its
        input)."""
        part = 0 if self.which == "query" else 1
        if self.layout == "packed":
            weight, bias = _packed(module)
            width = weight.shape[0] // 3
            rows = slice(part * width, (part + 1) * width)
            return F.linear(value, weight[rows], None if bias is None else bias[rows]).unflatten(
                -1, (self.heads, -1)
            )
        if self.layout == "fused":
            return value.unflatten(-1, (3, self.heads, -1))[:, :, part]
        if self.layout == "flat":
            return value.unflatten(-1, (self.heads, -1))
        return value.transpose(1, 2) if self.layout == "heads first" else value

    def watch(self, model: nn.Module, callback: Any) -> None:
        """Call keep(value) with what `read` takes each time the attention runs, for the block it is
        in to read."""
        module = model.get_submodule(self.path)
        if self.layout == "packed":
            module.register_forward_pre_hook(
                mark_skippable(partial(_call_with_input, callback)), with_kwargs=True
            )
        else:
            module.register_forward_hook(mark_skippable(partial(_call_with_output, callback)))


def _call_with_input(callback: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
    callback(main(args, kwargs))


def _call_with_output(callback: Any, module: nn.Module, args: Any, output: Any) -> None:
    callback(output)


def sources(model: nn.Module, structure: View, blocks: list[Block], which: Which) -> list[Source]:
    """Return where each block's queries or keys are read. Raises BadInput where a block's cannot be
    found."""
    trace = _Trace(model, [b.attention for b in blocks], which)
    trace.run(structure.example)
    return [_source(model, structure, block, which, trace) for block in blocks]


def _source(model: nn.Module, structure: View, block: Block, which: Which, trace: _Trace) -> Source:
    attention = next(a for a in structure.attention if a.path == block.attention)
    truth = trace.truth.get(block.attention)
    module = model.get_submodule(block.attention)
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or not module.batch_first:
            raise BadInput(
                f"'{block.attention}' has separate projections or its batch behind its tokens: its "
                "keys are not read"
            )
        return Source(block.attention, which, "packed", module.num_heads)
    if truth is None:  # not the fused kernel: what the view says
        path = attention.qkv or (attention.k if which == "key" else attention.q)
        if path is not None and attention.kind == "linear":
            return Source(path, which, "fused" if attention.qkv else "flat", attention.heads)
    else:
        # only the prefix is not rotated
        rows = structure.prefix_tokens if "rope" in structure.flags else truth.shape[2]
        heads, truth = truth.shape[1], truth[:, :, :rows].transpose(1, 2)
        layouts: tuple[Layout, ...] = ("heads first", "heads last", "flat", "fused")
        for path, value in reversed(trace.outputs[block.attention]):
            for layout in layouts if rows else ():
                candidate = Source(path, which, layout, heads)
                if _gives(candidate, model.get_submodule(path), value, truth, rows):
                    return candidate
        if rows == 0 and (
            path := attention.qkv or (attention.k if which == "key" else attention.q)
        ):
            return Source(path, which, "fused" if attention.qkv else "flat", heads)
        candidate = Source(block.attention, which, "packed", heads)
        if _packed(module)[0] is not None and _gives(
            candidate, module, trace.inputs[block.attention], truth, rows
        ):
            return candidate
    raise BadInput(f"the keys of '{block.attention}' ({type(module).__name__}) are given by none "
                   "of its parts, so that tokens cannot be compared by them")  # fmt: skip


def _gives(source: Source, module: nn.Module, value: Tensor, truth: Tensor, rows: int) -> bool:
    try:
        got = source.read(module, value)[:, :rows]
    except (RuntimeError, IndexError):  # not of that layout
        return False
    return got.shape == truth.shape and torch.allclose(got, truth, rtol=1e-4, atol=1e-5)


def _packed(module: nn.Module) -> tuple[Any, Any]:
    """Return the weight (3·width, width) that an attention reads itself, and its bias."""
    weight = getattr(module, "in_proj_weight", None)
    if weight is not None:
        return weight, getattr(module, "in_proj_bias", None)
    return getattr(getattr(module, "qkv", None), "weight", None), None


class _Trace(TorchFunctionMode):
    """What each attention was called with and what its parts gave, in one forward."""

    def __init__(self, model: nn.Module, paths: list[str], which: Which) -> None:
        super().__init__()
        self.model, self.paths, self.index = model, paths, 0 if which == "query" else 1
        self.inside: list[str] = []
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, list[tuple[str, Tensor]]] = {p: [] for p in paths}
        self.truth: dict[str, Tensor] = {}

    def run(self, example: Tensor) -> None:
        """Watch one forward."""
        hooks = []
        for path in self.paths:
            module = self.model.get_submodule(path)
            hooks.append(
                module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
            )
            hooks.append(module.register_forward_hook(lambda *a: self.inside.pop() and None))
            hooks += [
                m.register_forward_hook(partial(self._part, path, f"{path}.{n}"))
                for n, m in module.named_modules()
                if n
            ]
        with removing(hooks), probing(self.model), self:
            self.model(example)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention" and self.inside:
            name = ("query", "key")[self.index]
            value = args[self.index] if len(args) > self.index else (kwargs or {})[name]
            self.truth[self.inside[-1]] = value.detach().clone()
        return func(*args, **(kwargs or {}))

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(path)
        self.inputs[path] = main(args, kwargs).detach().clone()

    def _part(self, path: str, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.outputs[path].append((name, output.detach().clone()))
