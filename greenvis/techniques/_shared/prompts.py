"""What techniques share that put tokens of their own into the sequence of a vision transformer:
where, how, and where not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import first, row_of_blocks, with_first
from greenvis.techniques._shared.blocks import main, with_main
from greenvis.techniques._shared.doors import Doors, Passing


class Joined(nn.Module):
    """Tokens that join a sequence (batch, length, dim) behind its prefix, and leave it again:
    `length` of them.

    away: while it stays out of the sequence. between: its tokens on their way from block to block,
    where another door than the model's own forward is shown the sequence without them.
    """

    def __init__(self, prefix: int, length: int) -> None:
        super().__init__()
        self.prefix, self.length = prefix, length
        self.away = False
        self.between: dict[int, Tensor] = Passing()

    def rows_for(self, x: Tensor) -> Tensor:
        """Return the tokens (batch, length, dim) that join x (batch, tokens, dim)."""
        raise NotImplementedError

    def passed(self, number: int, x: Tensor) -> None:
        """Look at what enters a block while these are away: number 0 is the first they would join
        in."""

    def put(self, model: nn.Module, paths: Sequence[str], child: str, doors: Doors) -> None:
        """Live in the first of these blocks as `child`, join the sequence in it and leave it behind
        the last."""
        blocks = [model.get_submodule(path) for path in paths]
        blocks[0].add_module(child, self.train(blocks[0].training))
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            carrying: Any = Carrying(self, block, doors, number, last)
            block.forward = carrying

    def with_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return x (batch, tokens, dim) with the tokens in it."""
        return torch.cat([x[:, : self.prefix], rows.to(x.dtype), x[:, self.prefix :]], 1)

    def leave(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sequence without the tokens, and those."""
        start, end = self.prefix, self.prefix + self.length
        # before the sequence: who traces a block (torch.fx) takes the last value for its output
        rows = x[:, start:end]
        return torch.cat([x[:, :start], x[:, end:]], 1), rows

    def last(self, x: Tensor, rows: Tensor, laid_out: bool) -> Tensor:
        """Return what goes on behind the last block, of the sequence without the tokens, and of
        what became of these."""
        return x


class Carrying:
    """A block's forward with the tokens in its sequence."""

    def __init__(
        self, joined: Joined, block: nn.Module, doors: Doors, number: int, last: bool
    ) -> None:
        self.joined, self.block, self.doors, self.number = joined, block, doors, number
        self.last = last
        self.inner = vars(block).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        joined, doors, i = self.joined, self.doors, self.number
        x = main(args, kwargs)
        if joined.away:
            joined.passed(i, x)
            return self._run(args, kwargs)
        if not i:
            doors.begin()
        rows = joined.rows_for(x) if not i else joined.between[i] if doors.laid_out else None
        if rows is not None:
            x = joined.with_rows(x, rows)
        output = self._run(*with_main(args, kwargs, x))
        if not self.last and not doors.laid_out:
            return output
        x, rows = joined.leave(first(output))
        if self.last:
            return with_first(output, joined.last(x, rows, doors.laid_out))
        joined.between[i + 1] = rows
        return with_first(output, x)

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)


def prompt_blocks(model: nn.Module, structure: View) -> list[str]:
    """Return the blocks that attend, first to last. Raises BadInput where tokens of another kind
    cannot be right."""
    what = type(model).__name__
    if not structure.attention:
        raise BadInput(
            f"prompts are read by attention, and {what} has none; use adapters or low-rank changes"
        )
    if "windowed" in structure.flags:
        raise BadInput(f"{what} attends in windows of its grid, in which prompts have no place")
    if "rope" in structure.flags:
        raise BadInput(
            f"{what} rotates queries and keys by their place in the grid (RoPE), and a prompt has "
            "no place"
        )
    blocks = row_of_blocks(model, structure)
    _check_permutation(model, structure.example, blocks, structure.prefix_tokens)
    return blocks


def _check_permutation(model: nn.Module, example: Tensor, blocks: list[str], prefix: int) -> None:
    """Raise BadInput where a block gives the same patches in another order something else: it uses
    their places."""
    if example.device.type == "meta":
        return
    moved: list[str] = []

    def again(path: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = next((n for n, value in kwargs.items() if isinstance(value, Tensor)), "")
        x = rolled(args[0] if args else kwargs[name])
        other = (
            block.forward(x, *args[1:], **kwargs) if args else block.forward(**{**kwargs, name: x})
        )
        want = rolled(first(output)).float()
        error = (first(other).float() - want).abs().max()
        if not error <= (1e-3 if x.dtype.itemsize >= 4 else 5e-2) * want.abs().max():
            moved.append(path)

    def rolled(x: Tensor) -> Tensor:
        return torch.cat([x[:, :prefix], x[:, prefix:].roll(1, 1)], 1)

    hooks = [
        model.get_submodule(p).register_forward_hook(partial(again, p), with_kwargs=True)
        for p in blocks
    ]
    with removing(hooks), probing(model):
        model(example)
    if moved:
        raise BadInput(
            f"block '{moved[0]}' of {type(model).__name__} uses the places of its tokens, and a "
            "prompt has none"
        )
