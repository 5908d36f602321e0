"""What structured pruning takes out of a model: planned on a copy by torch-pruning, read off as
which elements of each tensor stay."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output
from greenvis.techniques.inference.structure._cuts import Cut, Plan, Share, removed
from greenvis.techniques.inference.structure._heads import drop_heads, obstacle


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
                drop_heads(model, trial, attention, share)
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
