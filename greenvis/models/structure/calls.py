"""What a traced forward saw: uses of weights, attentions, shapes, and the tags of where each tensor
came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from greenvis.core.example import tensors_in

Tags = frozenset[tuple[str, Any]]
NONE: Tags = frozenset()


@dataclass(frozen=True)
class Call:
    """One use of a weight. path: the module that owns it. functional: another module than the owner
    read it.

    direct: the parameter itself was used, not something computed from it. sources: the tags of the
    input.
    """

    path: str
    kind: str  # "linear", "conv", "norm"
    sources: Tags
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    weight_shape: tuple[int, ...] = ()
    depthwise: bool = False
    functional: bool = False
    direct: bool = True

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight_shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight_shape[1]

    @property
    def pooled(self) -> bool:
        """Whether the input has lost its positions: (batch, features) or (batch, channels, 1,
        1)."""
        return math.prod(self.in_shape[2:]) == 1 if self.kind == "conv" else len(self.in_shape) == 2


@dataclass
class AttentionCall:
    """One attention. shape: that of the queries, (…, heads, tokens, head_dim), or (batch, tokens,
    dim) of a fused module."""

    stack: tuple[str, ...]
    kind: str  # "linear", "multihead"
    q: Tags = NONE
    k: Tags = NONE
    v: Tags = NONE
    shape: tuple[int, ...] = ()
    heads: int | None = None
    out: str | None = None


@dataclass
class Trace:
    """What a traced forward saw."""

    input: Tensor
    output: Any = None
    calls: list[Call] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    # token counts of what each torch.cat along tokens joined
    joins: list[tuple[int, ...]] = field(default_factory=list)
    executed: dict[str, None] = field(default_factory=dict)
    # shapes in and out, by path
    runs: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = field(default_factory=dict)
    first_attention: int | None = None  # how many calls came before it
    tags: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The input's shape, (batch, channels, height, width)."""
        return tuple(self.input.shape)

    def tags_of(self, *values: Any) -> Tags:
        """Return the union of the tags of all tensors in `values`."""
        return NONE.union(*(self.tags[t] for t in tensors_in(values) if t in self.tags))


def weights_in(tags: Tags) -> list[str]:
    """Return the paths of the weights in `tags`, sorted, but for depthwise convolutions."""
    passed = {p for kind, p in tags if kind == "depthwise"}
    return sorted(p for kind, p in tags if kind == "weight" and p not in passed)
