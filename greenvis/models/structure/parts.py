"""Read the parts of a model off its trace: attention, MLPs, classifier, patch embedding, prefix
tokens, blocks, flags."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from greenvis.errors import GreenvisError
from greenvis.models.structure.calls import AttentionCall, Call, Trace, weights_in
from greenvis.tasks.answers import main_output

T = TypeVar("T")
# DeiT's two, CrossViT's two, auxiliary ones; the stream of a headless model has been through more
# layers
MOST_HEADS = 4


@dataclass(frozen=True)
class Attention:
    """One attention. kind: "linear" (own Linears), "multihead" (nn.MultiheadAttention),
    "functional" (weights read by another module than their own, so that a wrapped Linear would
    never run). Either qkv is set or q, k and v are; a fused pair stands twice."""

    path: str
    kind: Literal["linear", "multihead", "functional"]
    heads: int
    qkv: str | None = None
    q: str | None = None
    k: str | None = None
    v: str | None = None
    out: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths of the projections into attention."""
        return unique(p for p in (self.qkv, self.q, self.k, self.v) if p is not None)


@dataclass(frozen=True)
class Mlp:
    """One MLP: up, activation, down. gate: the activated branch of a gated MLP (SwiGLU)."""

    path: str
    up: str
    down: str
    gate: str | None = None


def attention(model: nn.Module, call: AttentionCall, functional: frozenset[str]) -> Attention:
    """Return the projections and heads of one attention that ran."""
    if call.kind == "multihead":
        return Attention(call.stack[-1], "multihead", call.heads or 1)
    q, k, v = (_only(weights_in(tags)) for tags in (call.q, call.k, call.v))
    fused = q is not None and q == k == v
    inside = [p for p in (q, k, v) if p is not None]
    path = next(
        (s for s in reversed(call.stack) if all(_within(p, s) for p in inside)), call.stack[-1]
    )
    heads = call.heads
    if heads is None:  # (batch * heads, tokens, head_dim): the projection's width tells how many
        weight = getattr(model.get_submodule(q), "weight", None) if q is not None else None
        width = call.shape[-1] if weight is None else weight.shape[0] // (3 if fused else 1)
        heads = max(1, width // call.shape[-1])
    kind = "functional" if functional & {*inside, call.out} else "linear"
    if fused:
        return Attention(path, kind, heads, qkv=q, out=call.out)
    return Attention(path, kind, heads, q=q, k=k, v=v, out=call.out)


def mlps(traced: Trace) -> tuple[Mlp, ...]:
    """Pairs of layers around an activation where the second gives the width back that the first
    took."""
    last: dict[str, Call] = {}
    convolutional = any(c.kind == "conv" for c in traced.calls)
    pairs: list[Mlp] = []
    for call in traced.calls:
        if call.kind == "norm":
            continue
        kinds = {kind for kind, _ in call.sources}
        ups = [last[p] for p in weights_in(call.sources) if p in last]
        gates = {p for kind, p in call.sources if kind == "gate"}
        # squeeze-and-excitation: an MLP on pooled features is a gate
        fits = (
            "act" in kinds
            and not kinds & {"sum", "attention", "scores", "map"}
            and (len(ups) == 1 or (len(ups) == 2 and "mul" in kinds))
            and all(_pointwise(c) and c.kind == call.kind for c in ups)
            and _pointwise(call)
            and not (call.kind == "conv" and "depthwise" in kinds)
            and all(c.in_features == call.out_features for c in ups)
            and not (convolutional and call.pooled)
        )
        if fits:
            gate = next((c.path for c in ups if c.path in gates), None) if len(ups) == 2 else None
            up = next(c.path for c in ups if c.path != gate)
            pairs.append(Mlp(_common(up, call.path), up, call.path, gate))
        last[call.path] = call
    return unique(pairs)


def heads(traced: Trace) -> tuple[str, ...]:
    """The last layers before the logits, if nothing but averaging comes after them."""
    try:
        logits = main_output(traced.output)
    except GreenvisError:
        return ()
    tags = traced.tags_of(logits)
    paths = weights_in(tags)
    kinds = {kind for kind, _ in tags}
    last = {c.path: c for c in traced.calls if c.kind != "norm"}
    classes = logits.shape[-1] if logits.dim() == 2 else logits.shape[1] if logits.dim() > 2 else 0
    if kinds & {"norm", "act"} or len(paths) > MOST_HEADS or any(p not in last for p in paths):
        return ()
    return tuple(paths) if all(last[p].out_features == classes for p in paths) else ()


def classifier(traced: Trace, heads: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that make up the classifier: of each last layer, the module around it all of
    whose layers read one vector an image (a head of several layers, VGG's three), and which is not
    the whole model."""
    return unique(_around(traced, head) for head in heads)


def _around(traced: Trace, head: str) -> str:
    best = path = head
    while path := _parent(path):
        inside = [c for c in traced.calls if _within(c.path, path)]
        outside = [c for c in traced.calls if not _within(c.path, path) and c.kind != "norm"]
        attends = any(_within(s, path) for a in traced.attentions for s in a.stack[-1:])
        if attends or not outside or not all(_one_vector(c) for c in inside):
            break
        layers = sum(c.kind != "norm" for c in inside)
        # a multi-layer perceptron: most of it is no head
        if all(_one_vector(c) for c in outside) and layers > len(outside):
            break
        if len(inside) > sum(_within(c.path, best) for c in traced.calls):
            best = path
    return best


def _one_vector(call: Call) -> bool:
    """Whether a layer's input has no positions: (batch, features), whatever axes of one lie around
    the features."""
    return math.prod(call.in_shape[1:]) == max(call.in_shape[1:], default=1)


def patch_embed(traced: Trace, tokens: bool) -> str | None:
    """Return the path of the layer that makes patches of the image, if one does."""
    first = next((c for c in traced.calls if c.kind != "norm"), None)
    if first is None or weights_in(first.sources):
        return None
    if first.kind == "linear":
        return first.path if tokens and len(first.in_shape) == 3 else None
    steps = [i // o for i, o in zip(first.in_shape[2:], first.out_shape[2:], strict=True) if o]
    if steps and all(s == k > 1 for s, k in zip(steps, first.weight_shape[2:], strict=True)):
        return first.path
    return None


def prefix_tokens(traced: Trace, patch_embed: str | None) -> int:
    """How many tokens the first attention has beyond the patches, where a grid of patches was
    joined with others."""
    if traced.first_attention is None or len(traced.attentions[0].shape) < 2:
        return 0
    before = traced.calls[: traced.first_attention]
    grids = {math.prod(c.out_shape[2:]) for c in before if c.kind == "conv"}
    grids |= {c.out_shape[1] for c in before if c.path == patch_embed and c.kind == "linear"}
    length = traced.attentions[0].shape[-2]
    joined = [
        part for join in traced.joins if sum(join) == length for part in join if part in grids
    ]
    return length - max(joined) if joined else 0


def prefix_position(traced: Trace, prefix: int) -> str:
    """Return "before" or "behind": where the prefix tokens were joined to the patches; "" without
    any."""
    if not prefix:
        return ""
    length = traced.attentions[0].shape[-2]
    joins = [join for join in traced.joins if sum(join) == length and length - prefix in join]
    return "behind" if joins and all(join[0] == length - prefix for join in joins) else "before"


def pooling(traced: Trace, heads: tuple[str, ...], blocks: tuple[str, ...], prefix: int) -> str:
    """Return how positions become one feature vector for the classifier: "mean", "max",
    "attention", "prefix token", or ""."""
    if not heads:
        return ""
    calls = [c for c in traced.calls if c.kind != "norm"]
    at = next((i for i, c in enumerate(calls) if c.path == heads[0]), 0)
    beside: set[tuple[str, object]] = set()  # marks of attention that no block holds
    for i, attention in enumerate(traced.attentions):
        if not any(_within(attention.stack[-1], block) for block in blocks):
            beside |= {("attention", i), ("weight", attention.out)}
    # layers between pooling and classifier are fed pooled features, too
    while at >= 0 and calls[at].pooled:
        poolings = {value for kind, value in calls[at].sources if kind == "pool"}
        if poolings:
            return " and ".join(sorted(poolings))
        if beside & calls[at].sources:
            return "attention"
        at -= 1
    return "prefix token" if prefix else ""


def blocks(model: nn.Module, traced: Trace) -> tuple[str, ...]:
    """The children of containers (else: siblings of one class; else: Sequentials) that ran and hold
    two or more layers.

    A stage steps aside for the blocks in it, where they hold most of its layers.
    """
    layers = [*unique(c.path for c in traced.calls if c.kind != "norm")]
    layers += [a.stack[-1] for a in traced.attentions if a.kind == "multihead"]
    modules = dict(model.named_modules())
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    counts: Counter[str] = Counter()
    for layer in layers:
        parts = layer.split(".")
        counts.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    modules_with_layers = [
        p
        for p in traced.executed
        if p and counts[p] >= 2 and not isinstance(modules[p], containers) and not _gates(traced, p)
    ]
    candidates = [p for p in modules_with_layers if isinstance(modules[_parent(p)], containers)]
    if not candidates:
        kinds = Counter((_parent(p), type(modules[p])) for p in modules_with_layers)
        candidates = [p for p in modules_with_layers if kinds[_parent(p), type(modules[p])] > 1]
    if not candidates:  # stages written as Sequentials
        sequentials = [
            p
            for p in traced.executed
            if p and counts[p] >= 2 and isinstance(modules[p], nn.Sequential)
        ]
        candidates = [p for p in sequentials if isinstance(modules[_parent(p)], containers)]

    def tops(among: list[str]) -> list[str]:
        return [c for c in among if not any(b != c and _within(c, b) for b in among)]

    def finest(path: str) -> list[str]:
        inner = tops([c for c in candidates if c != path and _within(c, path)])
        if 2 * sum(counts[c] for c in inner) > counts[path]:
            return [f for c in inner for f in finest(c)]
        return [path]

    return unique(f for c in tops(candidates) for f in finest(c))


def _gates(traced: Trace, path: str) -> bool:
    """Whether a module is squeeze-and-excitation: its layers read what is pooled of a map, and it
    gives a map."""
    inside = [c for c in traced.calls if _within(c.path, path) and c.kind != "norm"]
    output = next((shapes for _, shapes in traced.runs.get(path, ())), ())
    pooled = bool(inside) and any(kind == "pool" for kind, _ in inside[0].sources)
    return pooled and len(output) == 4 and all(map(_one_vector, inside))


def flags(model: nn.Module, traced: Trace) -> set[str]:
    """Return which of "windowed", "rope" and "batch_norm" the model is."""
    flags = set()
    for call in traced.attentions:
        if (
            call.heads is not None
            and len(call.shape) > 3
            and math.prod(call.shape[:-3]) > traced.input_shape[0]
        ):
            flags.add("windowed")
        if any(kind == "neg" for kind, _ in call.q):
            flags.add("rope")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        flags.add("batch_norm")
    return flags


def _pointwise(call: Call) -> bool:
    return call.kind == "linear" or (not call.depthwise and math.prod(call.weight_shape[2:]) == 1)


def _within(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(parent + ".")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _common(a: str, b: str) -> str:
    """The innermost module that holds both."""
    shared = ""
    for one, other in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if one != other:
            break
        shared = f"{shared}.{one}" if shared else one
    return shared


def _only(paths: list[str]) -> str | None:
    return paths[0] if len(paths) == 1 else None


def unique(values: Iterable[T]) -> tuple[T, ...]:
    """Return the values, each once, in their order."""
    return tuple(dict.fromkeys(values))
