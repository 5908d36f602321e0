"""Visual prompt tuning: freeze a vision transformer, learn tokens that stand between its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.technique import Installed, Stage, Technique
from greenvis.techniques.iteration._seams import check_runs, first, row_of_blocks, train_only, with_first
from greenvis.views import View, view
from greenvis.views.quiet import quiet

_CHILD = "prompt"


class Prompt(Technique):
    """Learn prompt tokens in the input of a frozen vision transformer (VPT: Jia et al., 2022): before the first block
    (shallow) or, new ones, before each (deep).

    Saves optimizer memory and storage per task (the delta). Costs compute, in training and for good: every block carries
    more tokens, and nothing merges. Order: [class and other prefix tokens][prompts][patches]. Prompts get no position
    embedding and start from U(±√(6 / (c·p² + dim))) for patches of c channels and side p. Behind the last block they are taken
    out, so a head that pools the patches does not see them. The classifier trains in full. Dropout and stochastic depth of
    the frozen part stay as `model.train()` sets them (the authors hold them off: give a model without).
    """

    name: ClassVar[str] = "prompt"
    stage: ClassVar[Stage] = "tokens"
    breaks: ClassVar[frozenset[str]] = frozenset({"token_grid"})
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 3}, {"tokens": 2, "depth": "deep", "head": "freeze"})
    neutral: ClassVar[Mapping[str, Any] | None] = None

    tokens: Annotated[int, Field(ge=1, description="prompts in each prompted block")] = 10
    depth: Annotated[Literal["shallow", "deep"], Field(description="prompt the first block, or each with its own")] = "shallow"
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the prompts")] = 0.0
    head: Annotated[Literal["train", "freeze"], Field(description="train the classifier in full, or leave it")] = "train"
    input_shape: Annotated[
        tuple[int, int, int] | None, Field(description="(channels, height, width) of an image, if it cannot be inferred")
    ] = None

    def install(self, model: nn.Module) -> Installed:
        """Put the prompts in. Raises BadInput for anything but a plain sequence of patches through all blocks."""
        found = view(model, self.input_shape, probe=False)
        blocks = _blocks(model, found)
        _check_places(model, found.example, blocks, found.prefix_tokens)
        length, dim = found.layouts[blocks[0]].output[1:]
        patch = math.prod(found.example.shape[1:]) / (length - found.prefix_tokens)  # c·p², also behind a convolutional stem
        bound = math.sqrt(6 / (patch + dim))
        weight = next(p for p in model.get_submodule(blocks[0]).parameters() if p.is_floating_point())
        added: list[nn.Parameter] = []
        for i, path in enumerate(blocks):
            if self.depth == "shallow" and i:
                break
            rows = torch.empty(self.tokens, dim, device=weight.device, dtype=weight.dtype).uniform_(-bound, bound)
            prompts = Prompts(rows, found.prefix_tokens, self.dropout)
            prompts.put(model, path, path if self.depth == "deep" else blocks[-1])
            added.append(prompts.rows)
        check_runs(model, found.example, added, f"{self.tokens} {self.depth} prompts")
        live = Installed(train_only(model, added, found, self.head), freezes=True)
        live.unmergeable = "prompts are tokens of the sequence, not a change of weights; keep the model wrapped"
        return live


class Prompts(nn.Module):
    """Rows (tokens, dim) that join a sequence (batch, length, dim) behind its prefix, and leave it again."""

    def __init__(self, rows: Tensor, prefix: int, dropout: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.dropout = nn.Dropout(dropout)
        self.prefix = prefix

    def put(self, model: nn.Module, enter: str, leave: str) -> None:
        """Live in block `enter`, join the sequence before it and leave it behind block `leave`."""
        block = model.get_submodule(enter)
        block.add_module(_CHILD, self.train(block.training))
        block.register_forward_pre_hook(self.join, with_kwargs=True)
        model.get_submodule(leave).register_forward_hook(self.leave)

    def join(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the block's arguments, with prompts in the first tensor."""
        if args:
            return (self.prompted(args[0]), *args[1:]), kwargs
        name = next(n for n, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: self.prompted(kwargs[name])}

    def prompted(self, x: Tensor) -> Tensor:
        """Return x (batch, length, dim) as (batch, length + tokens, dim)."""
        rows = self.dropout(self.rows).to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, : self.prefix], rows, x[:, self.prefix :]], 1)

    def leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the block's output without the prompts."""
        x = first(output)
        return with_first(output, torch.cat([x[:, : self.prefix], x[:, self.prefix + len(self.rows) :]], 1))


def _blocks(model: nn.Module, found: View) -> list[str]:
    """Return the blocks that attend, first to last. Raises BadInput where prompts cannot be right."""
    what = type(model).__name__
    if not found.attention:
        raise BadInput(f"prompts are read by attention, and {what} has none; use adapters or low-rank changes")
    if "windowed" in found.flags:
        raise BadInput(f"{what} attends in windows of its grid, in which prompts have no place")
    if "rope" in found.flags:
        raise BadInput(f"{what} rotates queries and keys by their place in the grid (RoPE), and a prompt has no place")
    return row_of_blocks(model, found)


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
