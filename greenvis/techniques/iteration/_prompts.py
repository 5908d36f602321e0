"""What techniques share that put tokens of their own into the sequence of a vision transformer: where, how, and where not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.techniques.iteration._seams import first, row_of_blocks, with_first
from greenvis.views import View
from greenvis.views.quiet import quiet


class Joined(nn.Module):
    """Tokens that join a sequence (batch, length, dim) behind its prefix, and leave it again: `length` of them."""

    def __init__(self, prefix: int, length: int) -> None:
        super().__init__()
        self.prefix, self.length = prefix, length

    def rows_for(self, x: Tensor) -> Tensor:
        """Return the tokens (batch, length, dim) that join x (batch, tokens, dim)."""
        raise NotImplementedError

    def put(self, model: nn.Module, enter: str, leave: str, child: str) -> None:
        """Live in block `enter` as `child`, join the sequence before it and leave it behind block `leave`."""
        block = model.get_submodule(enter)
        block.add_module(child, self.train(block.training))
        block.register_forward_pre_hook(self.join, with_kwargs=True)
        model.get_submodule(leave).register_forward_hook(self.leave)

    def join(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the block's arguments, with the tokens in the first tensor."""
        if args:
            return (self.prompted(args[0]), *args[1:]), kwargs
        name = next(n for n, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self.prompted(kwargs[name])}

    def prompted(self, x: Tensor) -> Tensor:
        """Return x (batch, tokens, dim) as (batch, tokens + length, dim)."""
        return torch.cat([x[:, : self.prefix], self.rows_for(x).to(x.dtype), x[:, self.prefix :]], 1)

    def leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the block's output without the tokens."""
        x = first(output)
        return with_first(output, torch.cat([x[:, : self.prefix], x[:, self.prefix + self.length :]], 1))


def prompt_blocks(model: nn.Module, found: View) -> list[str]:
    """Return the blocks that attend, first to last. Raises BadInput where tokens of another kind cannot be right."""
    what = type(model).__name__
    if not found.attention:
        raise BadInput(f"prompts are read by attention, and {what} has none; use adapters or low-rank changes")
    if "windowed" in found.flags:
        raise BadInput(f"{what} attends in windows of its grid, in which prompts have no place")
    if "rope" in found.flags:
        raise BadInput(f"{what} rotates queries and keys by their place in the grid (RoPE), and a prompt has no place")
    blocks = row_of_blocks(model, found)
    _check_places(model, found.example, blocks, found.prefix_tokens)
    return blocks


def _check_places(model: nn.Module, example: Tensor, blocks: list[str], prefix: int) -> None:
    """Raise BadInput where a block gives the same patches in another order something else: it uses their places."""
    if example.device.type == "meta":
        return
    moved: list[str] = []

    def again(path: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = next((n for n, value in kwargs.items() if isinstance(value, Tensor)), "")
        x = rolled(args[0] if args else kwargs[name])
        other = block.forward(x, *args[1:], **kwargs) if args else block.forward(**{**kwargs, name: x})
        want = rolled(first(output)).float()
        error = (first(other).float() - want).abs().max()
        if not error <= (1e-3 if x.dtype.itemsize >= 4 else 5e-2) * want.abs().max():
            moved.append(path)

    def rolled(x: Tensor) -> Tensor:
        return torch.cat([x[:, :prefix], x[:, prefix:].roll(1, 1)], 1)

    hooks = [model.get_submodule(p).register_forward_hook(partial(again, p), with_kwargs=True) for p in blocks]
    try:
        with quiet(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    if moved:
        raise BadInput(f"block '{moved[0]}' of {type(model).__name__} uses the places of its tokens, and a prompt has none")
