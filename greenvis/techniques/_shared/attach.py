"""What techniques share that put a module of their own behind a part of the model: where it lives,
what it is handed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.core.surgery import freeze
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.models.structure import View, reached
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output
from greenvis.techniques._shared.heads import head_parameters


def seat(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module to hook and to put a child into for the output of `path`, or None where a
    child would be run.

    A Sequential gives what its last child gives, and runs every child: so it is that last child.
    """
    module = model.get_submodule(path)
    while type(module).forward is nn.Sequential.forward and len(module._modules):
        module = list(module.children())[-1]
    return None if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else module


def like(module: nn.Module) -> dict[str, Any]:
    """Return device and dtype for new parts: those of the first floating-point parameter."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    return {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}


def precise(tensor: Tensor) -> torch.dtype:
    """Return the type to add up in: float32, or the tensor's own where that is wider. The square of
    a small gradient is 0 in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def row_of_blocks(model: nn.Module, structure: View) -> list[str]:
    """Return the blocks that attend, first to last, where one sequence (batch, tokens, dim) runs
    through all of them.

    Raises BadInput, with the shapes there are, where none does.
    """
    what = type(model).__name__
    blocks = [b for b in structure.blocks if any(_inside(a.path, b) for a in structure.attention)]
    outside = [not any(_inside(a.path, b) for b in blocks) for a in structure.attention]
    # attention pooling may come behind
    if not blocks or any(outside[: len(outside) - outside[::-1].index(False)]):
        raise BadInput(f"{what} does not show its attention as a row of blocks")
    layouts = [structure.layouts.get(b) for b in blocks]
    shapes = sorted(
        {s for layout in layouts for s in ((layout.inputs, layout.output) if layout else ((),))}
    )
    shape = shapes[0]
    if (
        len(shapes) > 1
        or len(shape) != 3
        or shape[0] != len(structure.example)
        or shape[1] <= structure.prefix_tokens
    ):
        described = " and ".join(map(str, shapes[:3])) + (" and others" if len(shapes) > 3 else "")
        raise BadInput(
            f"the blocks of {what} do not all take and give one sequence (batch, tokens, dim), but "
            f"{described}"
        )
    if any(seat(model, b) is not model.get_submodule(b) for b in blocks):
        raise BadInput(
            f"the blocks of {what} run every module they hold, so they cannot hold another"
        )
    return blocks


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def first(value: Any) -> Tensor:
    """Return the tensor in a module's output, or the first of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, new: Tensor) -> Any:
    """Return the output with its (first) tensor replaced."""
    return (new, *value[1:]) if isinstance(value, tuple) else new


def train_only(
    model: nn.Module, added: list[nn.Parameter], structure: View, head: str
) -> tuple[str, ...]:
    """Freeze all but what was added and, unless `head` is "freeze", the classifier; return the
    names that train."""
    if head != "train":
        return freeze(model, but=added)
    return freeze(
        model, but=[*added, *head_parameters(model, structure)], follows=structure.in_classifier
    )


def patches_matter(model: nn.Module, structure: View, path: str) -> bool:
    """Whether anything past `path` reads its tokens behind the prefix: not so where only the class
    token goes to the head."""
    if structure.example.device.type == "meta" or not structure.prefix_tokens:
        return True
    watched = [model.get_submodule(p) for p in structure.heads]
    noise = torch.Generator().manual_seed(0)
    outcomes: list[list[Tensor]] = []

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = first(output)[:, structure.prefix_tokens :]
        tokens = torch.rand(tokens.shape, generator=noise).to(tokens)
        return with_first(
            output, torch.cat([first(output)[:, : structure.prefix_tokens], tokens], 1)
        )

    for disturbed in (False, True):
        captured: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(partial(_capture, captured)) for m in watched]
        hooks += [model.get_submodule(path).register_forward_hook(disturb)] if disturbed else []
        with removing(hooks), probing(model):
            output = main_output(model(structure.example))
        outcomes.append(captured or [output])
    return not all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def _capture(captured: list[Tensor], module: nn.Module, args: Any) -> None:
    captured.append(args[0].clone())


def check_runs(model: nn.Module, example: Tensor, added: list[nn.Parameter], what: str) -> None:
    """Run `model` once. Raises BadInput where that fails, or where no gradient reaches what was
    added."""
    names = {n for n, p in model.named_parameters() if any(p is a for a in added)}
    try:
        live = reached(model, example, names)
    except GreenvisError:
        raise
    except Exception as error:  # whatever a model raises here means: not with this
        raise BadInput(
            f"{type(model).__name__} does not run with {what}: {type(error).__name__}: "
            f"{str(error).strip()[:200]}"
        ) from error
    if dead := sorted(names - live):
        raise BadInput(
            f"no gradient reaches {some(dead, 3)} of {what}: its place does not act on the model's "
            "output"
        )
