"""Tensors that go with a model into its file and back beside its own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput

ATTACHED = "greenvis.kept."  # before the names of tensors that lie beside a model's own in its file
SIZES = "sizes"  # the group of tensors that are smaller than the model is built with (pruned)
_BESIDE = "_greenvis_beside"
SETTINGS = "settings"  # the group of what is no weight and changes what weights do: dilations


def attach(model: nn.Module, name: str, tensors: Mapping[str, Tensor] | None) -> None:
    """Attach tensors to a model, which its own forward does not use: they go into its file and
    back.

    The model's keys stay what they are; its file's do not.

    Args:
        model: The model.
        name: Of the group of tensors.
        tensors: By name; None takes those of this group away.
    """
    others: dict[str, dict[str, Tensor]] = {
        k: v for k, v in model.__dict__.get(_BESIDE, {}).items() if k != name
    }
    model.__dict__[_BESIDE] = others if tensors is None else {**others, name: dict(tensors)}
    if not model.__dict__[_BESIDE]:
        del model.__dict__[_BESIDE]


def attached(model: nn.Module, name: str) -> dict[str, Tensor] | None:
    """Return tensors that were attached to a model.

    Args:
        model: The model.
        name: Of the group of tensors.

    Returns:
        What `attach` was given; None where it was not.
    """
    return model.__dict__.get(_BESIDE, {}).get(name)


def attach_settings(model: nn.Module, changes: Mapping[nn.Module, Mapping[str, Any]]) -> None:
    """Change attributes of modules that are no weights (a dilation, its padding), and attach them,
    so that the model's file brings them to where it is loaded.

    Args:
        model: The model.
        changes: Whole numbers, or several of them, by attribute, of modules of the model.
    """
    tensors = {**(attached(model, SETTINGS) or {})}
    paths = {module: path for path, module in model.named_modules()}
    for module, values in changes.items():
        for name, value in values.items():
            if vars(module)[name] != value:
                tensors[f"{paths[module]}.{name}"] = torch.tensor(value)
        vars(module).update(values)
    attach(model, SETTINGS, tensors or None)


def settings(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str
) -> dict[nn.Module, dict[str, Any]]:
    """Return what `attach_settings` took. Raises BadInput for what no module has, or has
    otherwise."""
    modules = dict(model.named_modules())
    out: dict[nn.Module, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        old = vars(modules[path]).get(name) if path in modules else None
        value: Any = tensor.tolist()
        numbers = [old] if type(old) is int else old if isinstance(old, (tuple, list)) else []
        fits = numbers and all(type(n) is int for n in (*numbers, *tensor.flatten().tolist()))
        if not fits or tensor.shape != torch.tensor(old).shape:
            raise BadInput(
                f"{source} hold {value} as '{name}' of '{path}', which this {type(model).__name__} "
                f"has as {old!r}: they belong to another model"
            )
        value = value if type(old) is int else type(old)(value)  # type: ignore[operator]
        out.setdefault(modules[path], {})[name] = value
    return out


def attach_sizes(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Attach how tensors of the model are smaller than those it is built with, so that the model's
    file brings that to where it is loaded.

    Args:
        model: The model, smaller already.
        sizes: By name of a parameter or buffer, its length along each axis; 0 where that is as
            built.
    """
    tensors = {**(attached(model, SIZES) or {})}
    attach(model, SIZES, {**tensors, **{n: torch.tensor(tuple(s)) for n, s in sizes.items()}})


def shapes_of(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that `attach_sizes` says, of this model. Raises BadInput where they are not
    those of a smaller one."""
    out = {}
    for name, tensor in tensors.items():
        shape = tuple(own[name].shape) if name in own else ()
        size = [int(n) for n in tensor.flatten().tolist()]
        if len(size) != len(shape) or any(
            not 0 <= n <= s for n, s in zip(size, shape, strict=True)
        ):
            raise BadInput(
                f"{source} hold '{name}' as a smaller one of {size}, which does not fit what is "
                f"built here {list(shape)}: they belong to another model"
            )
        out[name] = tuple(n or s for n, s in zip(size, shape, strict=True))
    return out


def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters and buffers smaller shapes: what they hold up to there."""
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, last)
        new = old.detach()[tuple(slice(n) for n in shape)].clone()
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(new, old.requires_grad)
        else:
            module._buffers[last] = new


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state and the tensors attached to it.

    Args:
        model: The model.

    Returns:
        Tensors by name, as the model's file has them.
    """
    beside = model.__dict__.get(_BESIDE, {})
    return {
        **model.state_dict(),
        **{
            f"{ATTACHED}{name}.{k}": t for name, of_one in beside.items() for k, t in of_one.items()
        },
    }


def prefixed(start: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names that begin with `start`."""
    return {start + k: v for k, v in state.items()}


def below(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `start`, by what follows it."""
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
