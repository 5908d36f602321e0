"""What structured pruning takes out of a model: planned on a copy, read off as which elements of
each tensor stay."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from greenvis.core.surgery import replace
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.parts import Attention
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


def require_torch_pruning() -> Any:
    """Return the package. Raises BadInput where it is not installed."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise BadInput("prune needs torch-pruning: pip install 'greenvis[prune]'")
    import torch_pruning

    return torch_pruning


def planned(model: nn.Module, structure: View, share: Share) -> Plan:
    """Return what stays of each module.

    Args:
        model: Stays as it is.
        structure: Its parts.
        share: What is taken out.

    Returns:
        One entry per module that becomes smaller; none where nothing can be taken out.

    Raises:
        BadInput: Where torch-pruning cannot follow the model's layers.
    """
    trial = copy.deepcopy(model)
    with probing(trial), torch.enable_grad():
        groups = [*_groups(trial, structure, share)]
    for tensor in _tensors(trial).values():  # from here on each element says where it stood
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    for group in groups:
        group.prune()
    if "heads" in share.parts:
        for attention in structure.attention:
            if share.takes(attention.path) and not obstacle(model, attention):
                _drop_heads(model, trial, attention, share)
    return _read(model, trial)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t for n, t in named.items() if t.is_floating_point()}


def _groups(trial: nn.Module, structure: View, share: Share) -> Iterator[Any]:
    """Yield torch-pruning's groups of channels and neurons to take out, before any is."""
    tp = require_torch_pruning()
    convs = [p for p in structure._role("conv") if p not in structure.functional]
    mlps = [m for m in structure.mlps if not structure.in_classifier(m.up) and share.takes(m.up)]
    if not (convs and "channels" in share.parts) and not (mlps and "neurons" in share.parts):
        return
    rank = tp.importance.GroupMagnitudeImportance(p=2)
    rank = _Drawn() if share.importance == "random" else rank
    fixed = [*structure.heads, *structure.computed, *structure.functional]
    fixed += [p for a in structure.attention for p in (a.path, *a.inputs)]
    fixed += [p for m in structure.mlps for p in (m.up, m.gate) if p is not None]
    if structure.attention or structure.mlps:
        fixed += [structure.patch_embed] if structure.patch_embed else []
    ignored = [m for p in fixed for m in trial.get_submodule(p).modules()]
    flags = [(p, p.requires_grad) for p in trial.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with warnings.catch_warnings(), _bounded(tp, trial):
            warnings.simplefilter("ignore")
            if convs and "channels" in share.parts:
                pruner = tp.pruner.BasePruner(
                    trial,
                    structure.example,
                    rank,
                    pruning_ratio=share.ratio,
                    ignored_layers=ignored,
                    root_module_types=[nn.modules.conv._ConvNd],
                    output_transform=main_output,
                    **({} if share.multiple_of == 1 else {"round_to": share.multiple_of}),
                )
                paths = {module: path for path, module in trial.named_modules()}
                groups: Any = pruner.step(interactive=True)
                for group in [*groups]:
                    members = [d.target.module for d, _ in group if _gives(tp, d)]
                    if any(share.takes(paths.get(m, "")) for m in members):
                        yield group
            if mlps and "neurons" in share.parts:
                graph = tp.DependencyGraph().build_dependency(
                    trial, structure.example, output_transform=main_output
                )
                yield from _neurons(tp, graph, trial, mlps, share, rank)
    except Exception as error:  # whatever it raises of a model whose layers it cannot follow
        raise BadInput(
            f"torch-pruning cannot follow the layers of {type(trial).__name__}: "
            f"{type(error).__name__}: {str(error).strip()[:200]}"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _bounded(tp: Any, model: nn.Module) -> Iterator[None]:
    """End torch-pruning's walk from layer to layer where it would not end: where a split of
    channels leads back to itself (a state space's) it comes by with new indices for ever."""
    most = 1_000 + 20 * sum(1 for _ in model.modules())
    group_type, add = tp.dependency.Group, tp.dependency.Group.add_dep

    def bounded(group: Any, dep: Any, idxs: Any) -> None:
        if len(group) >= most:
            raise RuntimeError(f"its layers depend on each other in more than {most:,} ways")
        add(group, dep, idxs)

    with patch.object(group_type, "add_dep", bounded):
        yield


class _Drawn:
    """Importance at random, the same each time."""

    def __call__(self, group: Any) -> Tensor:
        count = len(group[0].idxs)
        return torch.rand(count, generator=torch.Generator().manual_seed(count))


def _gives(tp: Any, dependency: Any) -> bool:
    """Whether a layer of a group loses outputs."""
    module = dependency.target.module
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return isinstance(module, kinds) and "out" in dependency.handler.__name__


def _neurons(
    tp: Any, graph: Any, trial: nn.Module, mlps: Collection[Any], share: Share, rank: Any
) -> Iterator[Any]:
    for mlp in mlps:
        up: Any = trial.get_submodule(mlp.up)
        handler = graph.get_pruner_of_module(up).prune_out_channels
        count = graph.get_out_channels(up)
        out = removed(count, share.ratio, share.multiple_of)
        if not out:
            continue
        scores = rank(graph.get_pruning_group(up, handler, list(range(count))))
        lowest = torch.argsort(scores, stable=True)[:out].tolist()
        group = graph.get_pruning_group(up, handler, sorted(lowest))
        if graph.check_pruning_group(group):
            yield group


def removed(count: int, ratio: float, multiple_of: int = 1) -> int:
    """Return how many of `count` units go, so that one at least and a multiple stays."""
    stay = max(1, round(count * (1 - ratio)))
    if multiple_of > 1:
        stay = min(count, math.ceil(stay / multiple_of) * multiple_of)
    return count - stay


# -- heads ----------------------------------------------------------------------------------------


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


def _drop_heads(model: nn.Module, trial: nn.Module, attention: Attention, share: Share) -> None:
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


# -- a plan, put into effect ----------------------------------------------------------------------


def _read(model: nn.Module, trial: nn.Module) -> Plan:
    """Return what became smaller on the copy."""
    plan: Plan = {}
    for path, module in trial.named_modules():
        old = model.get_submodule(path)
        cut = Cut()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            before = getattr(old, name)
            if tensor is not None and before is not None and tensor.shape != before.shape:
                cut.tensors[name] = tensor.detach().round().long().cpu()
        for name, value in vars(module).items():
            number = type(value) is int or (
                isinstance(value, tuple) and set(map(type, value)) == {int}
            )
            if number and name in vars(old) and vars(old)[name] != value:
                cut.settings[name] = value
        if cut.tensors or cut.settings:
            plan[path] = cut
    return plan


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
