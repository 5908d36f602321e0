"""Attention heads that go: where one can, which, and what an attention is without them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.models.structure import View
from greenvis.models.structure.parts import Attention
from greenvis.techniques.inference.structure._cuts import Share, removed


def obstacle(model: nn.Module, attention: Attention) -> str:
    """Return why no head of an attention can be taken out; "" where one can."""
    if attention.kind != "linear" or attention.out is None:
        return "its projections are read by another module than their own"
    if attention.heads < 2:
        return "it has one head"
    layers: list[Any] = [model.get_submodule(p) for p in (*attention.inputs, attention.out)]
    if not all(isinstance(m, nn.Linear) and "forward" not in vars(m) for m in layers):
        return "its projections are no plain Linears"
    width, parts = layers[-1].in_features, 3 if attention.qkv else 1
    if any(m.out_features != parts * width for m in layers[:-1]) or width % attention.heads:
        return "its projections are of several widths"
    if not attention.qkv and len(layers) != 4:
        return "its queries, keys and values are not of three projections"
    return ""


def _rows(attention: Attention, width: int, heads: Tensor) -> Tensor:
    """Return the rows of a projection that belong to heads; a fused one has queries, keys and
    values one behind the other."""
    dim = width // attention.heads
    own = (heads[:, None] * dim + torch.arange(dim)).flatten()
    return own if attention.qkv is None else torch.cat([own + i * width for i in range(3)])


def _scores(model: nn.Module, attention: Attention, share: Share) -> Tensor:
    out: Any = model.get_submodule(attention.out or "")
    if share.importance == "random":
        generator = torch.Generator().manual_seed(attention.heads)
        return torch.rand(attention.heads, generator=generator)
    total = torch.zeros(attention.heads, dtype=torch.float64)
    for head in range(attention.heads):
        one = torch.tensor([head])
        for path in attention.inputs:
            layer: Any = model.get_submodule(path)
            rows = _rows(attention, out.in_features, one)
            total[head] += layer.weight.detach().double().cpu()[rows].square().sum()
        columns = _rows(Attention("", "linear", attention.heads), out.in_features, one)
        total[head] += out.weight.detach().double().cpu()[:, columns].square().sum()
    return total


def heads_that_stay(model: nn.Module, attention: Attention, share: Share) -> Tensor:
    """Return the heads of an attention that stay, int64 in order."""
    go = removed(attention.heads, share.ratio)
    order = torch.argsort(_scores(model, attention, share), stable=True)
    return order[go:].sort().values


def drop_heads(model: nn.Module, trial: nn.Module, attention: Attention, share: Share) -> None:
    """Take heads out of a copy of the model, from the inputs of an attention and its output."""
    stay = heads_that_stay(model, attention, share)
    if len(stay) == attention.heads:
        return
    out: Any = trial.get_submodule(attention.out or "")
    width = out.in_features
    for path in attention.inputs:
        layer: Any = trial.get_submodule(path)
        rows = _rows(attention, width, stay)
        layer.weight = nn.Parameter(layer.weight.detach()[rows])
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[rows])
        layer.out_features = len(rows)
    columns = _rows(Attention("", "linear", attention.heads), width, stay)
    out.weight = nn.Parameter(out.weight.detach()[:, columns])
    out.in_features = len(columns)
    owner = trial.get_submodule(attention.path)
    for module in owner.modules():
        _fewer_heads(module, attention.heads, stay, width, len(columns))


def _fewer_heads(module: nn.Module, heads: int, stay: Tensor, width: int, now: int) -> None:
    """Let a module of an attention know of its heads: its own tables with an axis of them, and its
    numbers."""
    for name, parameter in [*module._parameters.items()]:
        axes = (
            [i for i, n in enumerate(parameter.shape) if n == heads]
            if parameter is not None
            else []
        )
        if parameter is not None and parameter.dim() > 1 and len(axes) == 1 and not _layer(module):
            module._parameters[name] = nn.Parameter(parameter.detach().index_select(axes[0], stay))
    for name, value in [*vars(module).items()]:
        if type(value) is not int or name.startswith("_") or _layer(module):
            continue
        if "head" in name and "dim" not in name and "size" not in name and value == heads:
            setattr(module, name, len(stay))
        elif value == width and name in ("attn_dim", "all_head_size", "inner_dim"):
            setattr(module, name, now)


def _layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def silent(model: nn.Module, structure: View, share: Share) -> nn.Module:
    """Return a copy of a model in which the heads that go say nothing: what it is to answer
    without them."""
    copied = copy.deepcopy(model)
    for attention in structure.attention:
        if share.takes(attention.path) and not obstacle(model, attention):
            stay = heads_that_stay(model, attention, share)
            go = torch.tensor(
                [h for h in range(attention.heads) if h not in stay], dtype=torch.int64
            )
            out: Any = copied.get_submodule(attention.out or "")
            columns = _rows(Attention("", "linear", attention.heads), out.in_features, go)
            with torch.no_grad():
                out.weight[:, columns] = 0.0
    return copied
