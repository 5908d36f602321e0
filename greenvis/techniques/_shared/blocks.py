"""A transformer block run in two halves, attention and MLP, so that tokens may leave in between; no
forward is copied.

Both halves are the library's own block: a shallow copy that shares every part, in which the other
branch is silent (it adds zero). LayerScale, stochastic depth, q/k norms and fused attention stay
what they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.core.surgery import mark_skippable
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import first, row_of_blocks

MASKS = ("attn_mask", "attention_mask")


class Block:
    """One block in two halves. attend(x, …) is x + attention, feed(x, …) is x + MLP;
    feed(attend(x)) is the block, bit for bit.

    Both take and give what the block does. rotary: whether an argument holds rotary embeddings, a
    row for each patch.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        attention: str,
        runs: Sequence[tuple[str, int]],
        split: int,
    ) -> None:
        self.module, self.path, self.attention = module, path, attention
        self.rotary = False
        self._attend = _silenced(module, dict(runs[split:]))
        self._feed = _silenced(module, dict(runs[:split]))

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention half."""
        return self._run(self._attend, args, kwargs)

    def feed(self, *args: Any, **kwargs: Any) -> Any:
        """Run the MLP half."""
        return self._run(self._feed, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block as the library wrote it."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def _run(self, half: nn.Module, args: Any, kwargs: Any) -> Any:
        if half.training != self.module.training:
            half.training = self.module.training
        return half.forward(*args, **kwargs)


class Silent(nn.Module):
    """Stands for a part of a silenced branch: a zero (1, 1, 1), alone or in front of a tuple of
    `outputs` entries."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the zero, whatever comes."""
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        zero = x.new_zeros((1, 1, 1))
        return (zero, *[None] * (self.outputs - 1)) if self.outputs else zero


def split_blocks(model: nn.Module, structure: View, what: str) -> list[Block]:
    """Return the blocks of `model` in order, each in halves that were checked to equal it.

    Args:
        model: to split.
        structure: its view.
        what: what is to be done to tokens, for messages ("token merging").

    Raises:
        BadInput: for windows, for anything but pre-norm blocks (x + attention, then x + MLP), and
            for blocks that use the positions of their tokens otherwise than by rotary embeddings
            they are handed.
    """
    name = type(model).__name__
    if not structure.attention:
        raise BadInput(f"{what} goes by attention, and {name} has none")
    if "windowed" in structure.flags:
        raise BadInput(
            f"{name} attends in windows of its grid, whose tokens {what} would move; take a model "
            "with global attention"
        )
    paths = row_of_blocks(model, structure)
    runs, calls = _watch(model, structure, paths)
    blocks = [_split(model, structure, path, runs[path]) for path in paths]
    with probing(model):
        for block in blocks:
            args, kwargs = calls[block.path]
            _check(block, args, kwargs, structure, what)
    return blocks


def _watch(
    model: nn.Module, structure: View, paths: list[str]
) -> tuple[dict[str, list[tuple[str, int]]], dict[str, tuple[Any, Any]]]:
    """Run the model; return for each block the children that ran once with the length of their
    output tuples, and its call."""
    ran: dict[str, dict[str, list[int]]] = {p: {} for p in paths}
    calls: dict[str, tuple[Any, Any]] = {}
    hooks = []

    def child(path: str, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            ran[path].setdefault(name, []).append(len(output) if isinstance(output, tuple) else 0)

        return note

    def block_hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[path] = (args, kwargs)

        return note

    for path in paths:
        block = model.get_submodule(path)
        hooks += [
            module.register_forward_hook(child(path, name))
            for name, module in block.named_children()
        ]
        hooks.append(block.register_forward_hook(block_hook(path), with_kwargs=True, prepend=True))
    with removing(hooks), probing(model):
        model(structure.example)
    return {p: [(n, k[0]) for n, k in by.items() if len(k) == 1] for p, by in ran.items()}, calls


def _split(model: nn.Module, structure: View, path: str, runs: list[tuple[str, int]]) -> Block:
    """Return the block cut before the first norm behind its attention."""
    inside = [a.path for a in structure.attention if a.path.startswith(path + ".")]
    if len(inside) != 1:
        raise BadInput(
            f"block '{path}' of {type(model).__name__} has {len(inside)} attentions; one is needed"
        )
    names = [name for name, _ in runs]
    child = inside[0][len(path) + 1 :].split(".")[0]
    behind = names[names.index(child) + 1 :] if child in names else []
    norm = next((n for n in behind if f"{path}.{n}" in structure.norms), None)
    if norm is None:
        raise BadInput(
            f"block '{path}' of {type(model).__name__} "
            f"({type(model.get_submodule(path)).__name__}) has no norm between its "
            "attention and its MLP to cut it at"
        )
    return Block(model.get_submodule(path), path, inside[0], runs, names.index(norm))


def _silenced(module: nn.Module, parts: dict[str, int]) -> nn.Module:
    half = copy.copy(module)
    vars(half)["_modules"] = {
        **module._modules,
        **{name: Silent(outputs) for name, outputs in parts.items()},
    }
    return half


def _check(block: Block, args: Any, kwargs: Any, structure: View, what: str) -> None:
    """Raise BadInput where the halves are not the block, or where it uses the places of its
    tokens."""
    x = main(args, kwargs)
    if x.device.type == "meta":
        return
    where = f"block '{block.path}' ({type(block.module).__name__})"
    with torch.no_grad():
        try:
            between = with_main(args, kwargs, first(block.attend(*args, **kwargs)))
            output = first(block.feed(*between[0], **between[1]))
        except Exception as error:  # whatever a block raises here means: not in halves
            raise BadInput(
                f"{where} is not x + attention followed by x + MLP (pre-norm): "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        if not torch.equal(output, first(block.forward(*args, **kwargs))):
            raise BadInput(
                f"{where} is not x + attention followed by x + MLP (pre-norm), so {what} finds no "
                "place in it"
            )
        prefix, length = structure.prefix_tokens, x.shape[1]
        shifted = torch.arange(prefix, length, device=x.device).roll(1)
        order = torch.cat([torch.arange(prefix, device=x.device), shifted])
        if "rope" in structure.flags:
            args, kwargs, block.rotary = rotated(
                args, kwargs, order.expand(len(x), -1), prefix, length
            )
        args, kwargs = with_main(args, kwargs, x[:, order])
        again = first(block.forward(*args, **kwargs)).float()
        error = (again - output[:, order].float()).abs().max()
        if not error <= (1e-3 if x.dtype.itemsize >= 4 else 5e-2) * output.float().abs().max():
            raise BadInput(f"{where} uses the places of its tokens, which {what} would change")


# -- arguments of a block -------------------------------------------------------------------------


def main(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tokens among a block's arguments: the first."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


def with_main(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with other tokens."""
    if args:
        return (x, *args[1:]), kwargs
    name = next(n for n, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, name: x}


def rotated(
    args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor, prefix: int, length: int
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Select the rows of each rotary embedding among a block's arguments.

    Args:
        args, kwargs: of the block. An embedding is a tensor (patches, features) or (heads, patches,
            features) behind the tokens, alone or in a tuple.
        positions: int64 (batch, tokens), where each token (its prefix first) stood in the sequence.
        prefix: tokens before the patches.
        length: of the sequence.

    Returns:
        The arguments, each embedding now (batch, 1 or heads, tokens, features), and whether there
        was one.
    """
    has_rope = False

    def rows(value: Any) -> Any:
        nonlocal has_rope
        if isinstance(value, (tuple, list)):
            return type(value)(map(rows, value))
        if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
            return value
        if value.shape[-2] not in (length - prefix, length):
            return value
        has_rope = True
        index = positions if value.shape[-2] == length else positions[:, prefix:] - prefix
        heads = value.reshape(-1, *value.shape[-2:])  # (1 or heads, patches, features)
        return heads.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)

    head, tail = args[:1], args[1:]
    if not args:
        name = next(n for n, v in kwargs.items() if isinstance(v, Tensor))
        return args, {n: v if n == name else rows(v) for n, v in kwargs.items()}, has_rope
    out = tuple(map(rows, tail))
    return (*head, *out), {n: rows(v) for n, v in kwargs.items()}, has_rope


# -- the mask of an attention ---------------------------------------------------------------------


def masked_attention(model: nn.Module, path: str, block: str) -> nn.Module:
    """Return the attention, or the module around it, that takes a mask.

    Raises:
        BadInput: where none within the block does.
    """
    while path != block:
        module = model.get_submodule(path)
        if _mask_name(module):
            return module
        path = path.rpartition(".")[0]
    raise BadInput(f"the attention of block '{block}' takes no mask ({' or '.join(MASKS)})")


def set_mask(module: nn.Module, mask: Callable[[Tensor | None], Tensor | None]) -> None:
    """Change the mask of an attention, by the library's own argument.

    Args:
        module: the attention.
        mask: called with the mask that the attention is called with, mostly None; returns the one
            to use, which is added to the logits: (batch, 1, 1 or length, length).
    """
    name = _mask_name(module)
    index = list(inspect.signature(type(module).forward).parameters).index(name) - 1
    module.register_forward_pre_hook(
        mark_skippable(partial(_put, mask, name, index)), with_kwargs=True
    )


def _put(
    mask: Callable[[Tensor | None], Tensor | None],
    name: str,
    index: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    attn_mask = args[index] if len(args) > index else kwargs.get(name)
    new_mask = mask(attn_mask)
    if new_mask is attn_mask or new_mask is None:
        return None
    new_mask = new_mask.to(main(args, kwargs).dtype)
    if isinstance(module, nn.MultiheadAttention):
        if new_mask.shape[2] == 1:
            return args, {**kwargs, "key_padding_mask": new_mask[:, 0, 0]}
        new_mask = new_mask.expand(-1, module.num_heads, -1, -1).flatten(0, 1)
    if len(args) > index:
        return (*args[:index], new_mask, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: new_mask}


def gather_mask(attn_mask: Tensor, positions: Tensor, length: int) -> Tensor:
    """Cut a mask to the tokens at some positions.

    Args:
        attn_mask: (…, 1 or heads, 1 or length, length), added to logits, or bool.
        positions: int64 (batch, tokens).
        length: of the full sequence; a mask of another is returned as it is.

    Returns:
        (batch, 1 or heads, 1 or tokens, tokens), added to logits.
    """
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, device=attn_mask.device).masked_fill(
            ~attn_mask, float("-inf")
        )
    if attn_mask.dim() != 4 or attn_mask.shape[-1] != length:
        return attn_mask
    batch, tokens = positions.shape
    cut = attn_mask.expand(batch, -1, -1, -1)
    cut = cut.gather(3, positions[:, None, None].expand(-1, *cut.shape[1:3], tokens))
    if cut.shape[2] == 1:
        return cut
    return cut.gather(2, positions[:, None, :, None].expand(-1, cut.shape[1], -1, tokens))


def _mask_name(module: nn.Module) -> str:
    parameters = inspect.signature(type(module).forward).parameters
    return next((n for n in MASKS if n in parameters), "")
