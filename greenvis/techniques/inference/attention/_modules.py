"""An attention as a module of our own, with the projections of the one that was there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import Attention
from greenvis.models.structure.layout import as_map
from greenvis.models.structure.probing import probing

_MASKS = ("attn_mask", "attention_mask", "key_padding_mask")


class Seen:
    """What one forward of an attention took and gave, and which of its parts ran in which order."""

    def __init__(self, model: nn.Module, path: str, x: Tensor) -> None:
        self.module = model.get_submodule(path)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None
        self.parts: list[tuple[str, nn.Module, tuple[int, ...]]] = []
        names = {m: n for n, m in self.module.named_modules() if n and not m._modules}
        hooks = [self.module.register_forward_hook(self._note, with_kwargs=True)]
        for module, name in names.items():
            hooks.append(module.register_forward_hook(self._part(name)))
        with removing(hooks), probing(model):
            model(x)

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output

    def _part(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.parts.append((name, module, tuple(output.shape)))

        return note

    @property
    def x(self) -> Tensor:
        """Its input (batch, tokens, channels)."""
        return next(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))


class OwnAttention(nn.Module):
    """Self-attention with any core. It has the parts of the attention it was made from, under their
    names.

    Args:
        seen: A forward of that.
        attention: Its projections and heads.
        core: What mixes tokens: of queries, keys, values and weights of keys.
    """

    def __init__(self, seen: Seen, attention: Attention, core: nn.Module) -> None:
        super().__init__()
        old = seen.module
        for name, child in old.named_children():
            self.add_module(name, child)
        for name, parameter in old._parameters.items():
            self.register_parameter(name, parameter)
        self.core = core
        self.local_conv: LocalConv | None = None  # of the values, beside the core
        self.out_gate: nn.Linear | None = None  # a gate on what both give
        self.heads = attention.heads
        self.multihead = isinstance(old, nn.MultiheadAttention)
        self.tuple = len(seen.output) if isinstance(seen.output, tuple) else 0
        inside = attention.path + "." if attention.path else ""
        local = {
            name: None if path is None or not path.startswith(inside) else path[len(inside) :]
            for name, path in (
                ("qkv", attention.qkv), ("q", attention.q), ("k", attention.k), ("v", attention.v),
                ("out", attention.out),
            )
        }  # fmt: skip
        self.local: dict[str, str | None] = local
        order = [name for name, _, _ in seen.parts]
        inputs = [n for n in (local["qkv"], local["q"], local["k"], local["v"]) if n]
        last = max((order.index(n) for n in inputs if n in order), default=-1)
        out = order.index(local["out"]) if local["out"] in order else len(order)
        per_head = [n for n, _, shape in seen.parts[last + 1 : out] if len(shape) == 4]
        self.norms = per_head if len(per_head) == 2 else []
        between = [n for n in order[last + 1 : out] if n not in self.norms]
        self.between, self.behind = between, order[out + 1 :]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention that was there returns, without its maps."""
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if self.multihead and any(v is not x for v in args[1:3]):
            raise BadInput(
                "a converted attention attends within one sequence: query, key and value must be "
                "the same"
            )
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self._project(x))
        if self.norms:
            q, k = (self.get_submodule(n)(t) for n, t in zip(self.norms, (q, k), strict=True))
        y = self.core(q, k, v, self._weights(args, kwargs, x))
        if self.local_conv is not None:
            y = y + self.local_conv(v)
        y = y.transpose(1, 2).flatten(2)
        if self.out_gate is not None:
            y = y * self.out_gate(x)
        for name in self.between:
            y = self.get_submodule(name)(y)
        if self.multihead:
            y = self.get_submodule("out_proj")(y)
        elif self.local["out"] is not None:
            y = self.get_submodule(self.local["out"])(y)
        for name in self.behind:
            y = self.get_submodule(name)(y)
        return (y, *[None] * (self.tuple - 1)) if self.tuple else y

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if self.multihead:
            own: Any = self
            return F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        if self.local["qkv"] is not None:
            return self.get_submodule(self.local["qkv"])(x).chunk(3, -1)
        return [self.get_submodule(str(self.local[n]))(x) for n in "qkv"]

    def _weights(self, args: Any, kwargs: Mapping[str, Any], x: Tensor) -> Tensor | None:
        masks = [(n, m) for n, m in kwargs.items() if n in _MASKS and m is not None]
        if not self.multihead:
            masks += [("attn_mask", m) for m in args[1:] if isinstance(m, Tensor)]
        weights: Tensor | None = None
        for name, mask in masks:
            one = key_weights(mask, x.shape[1], name == "key_padding_mask", self.multihead)
            weights = one if weights is None else weights * one
        return weights


class LocalConv(nn.Module):
    """A depthwise convolution of the values on the grid of their patches, the same for all heads,
    which gives nothing at first (PolaFormer: Meng et al., 2025, eq. 9).

    Args:
        kernel: Its side.
        prefix: Tokens before the patches, which get nothing.
        aspect: Height / width of the image.
        dim: Of each head.
        like: A tensor of the wanted type, on the wanted device.
    """

    def __init__(self, kernel: int, prefix: int, aspect: float, dim: int, like: Tensor) -> None:
        super().__init__()
        self.prefix, self.aspect = prefix, aspect
        conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim).to(like)
        self.depthwise = conv
        nn.init.zeros_(conv.weight)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)

    def forward(self, v: Tensor) -> Tensor:
        """Return (batch, heads, tokens, dim) of values of that shape. Raises BadInput for tokens on
        no grid."""
        try:
            maps = as_map(v.flatten(0, 1), -1, self.prefix, self.aspect)
        except GreenvisError as error:
            raise BadInput(
                f"a convolution of the values has no grid: {v.shape[2]} tokens are no class token "
                "and patches (those of a text?); name the attentions of images as targets"
            ) from error
        local = self.depthwise(maps).flatten(2).transpose(1, 2)
        return F.pad(local, (0, 0, self.prefix, 0)).view_as(v)


def new_gate(width: int, inner: int, like: Tensor) -> nn.Linear:
    """Return a gate of tokens (batch, tokens, width) on `inner` channels that is open at first."""
    gate = nn.Linear(width, inner).to(like)
    nn.init.zeros_(gate.weight)
    nn.init.ones_(gate.bias)
    return gate


def key_weights(mask: Tensor, tokens: int, padding: bool, inverted: bool = False) -> Tensor:
    """Return how much each key counts, of a mask that is the same for all queries.

    Args:
        mask: Boolean, or added to the scores; (batch or 1, heads or 1, 1, tokens), of padding also
            (batch, tokens).
        tokens: How many keys there are.
        padding: Whether the mask is of padding.
        inverted: Whether True means to leave a key out, as nn.MultiheadAttention has it.

    Returns:
        (batch or 1, 1 or heads, tokens, 1).

    Raises:
        BadInput: For a mask that says something else for each query: linear attention has no
            scores to add it to.
    """
    if padding and mask.dim() == 2:
        mask = mask[:, None, None, :]
    if mask.dim() != 4 or mask.shape[-1] != tokens or mask.shape[-2] != 1:
        raise BadInput(
            f"a mask {tuple(mask.shape)} says something else for each query (causal, windows, "
            "relative positions), which linear attention cannot follow; one of keys alone is "
            f"(batch, 1, 1, {tokens})"
        )
    if mask.dtype is torch.bool:
        weights = (~mask if inverted else mask).float()
    else:
        weights = mask.float().exp()
    return weights.transpose(-2, -1)


class Softmax(nn.Module):
    """What the converted core stands in for; used to hold a conversion against the original."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return softmax attention."""
        mask = None if weights is None else weights.log().transpose(-2, -1).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask)


def own_attention(model: nn.Module, attention: Attention, x: Tensor) -> OwnAttention:
    """Return a module that computes, with softmax, what an attention of the model computes.

    Args:
        model: The model.
        attention: One of its attentions.
        x: Images (batch, channels, height, width).

    Returns:
        The module; set its `core`.

    Raises:
        BadInput: Where the attention does more than project, attend and project.
    """
    seen = Seen(model, attention.path, x)
    what = f"'{attention.path}' ({type(seen.module).__name__})" if attention.path else "the model"
    reason = "it rotates or biases queries and keys, attends in windows, or returns something else"
    try:
        twin = OwnAttention(seen, attention, Softmax())
        with probing(twin):
            got = twin(*seen.args, **seen.kwargs)
    except BadInput:
        raise
    except Exception as error:  # whatever does not fit together here
        raise BadInput(f"{what} is not converted: {reason} ({type(error).__name__})") from error
    one, other = (v[0] if isinstance(v, tuple) else v for v in (got, seen.output))
    close = isinstance(other, Tensor) and one.shape == other.shape
    limit = 1e-4 if one.dtype.itemsize >= 4 else 2e-2
    if not close or (one - other).abs().max() > limit * other.abs().max():
        raise BadInput(f"{what} is not converted: {reason}")
    return twin
