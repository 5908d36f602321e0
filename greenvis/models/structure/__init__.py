"""What a vision model consists of, found by structure in a traced forward, not by the names a
library chose.

`view(model)` finds attention (q, k, v or fused qkv, out, heads), MLPs, convolutions, norms, blocks,
patch embedding, prefix tokens and classifier in timm, torchvision, transformers and plain models
alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from greenvis.core.example import tensors_in
from greenvis.errors import BadInput, nearest
from greenvis.models.structure import parts
from greenvis.models.structure.layout import Layout, layouts
from greenvis.models.structure.parts import Attention, Mlp, unique
from greenvis.models.structure.probing import image, probing
from greenvis.models.structure.trace import Trace, trace, trace_any

ROLES: dict[str, str] = {
    "attention": "the projections of attention: q, k, v (or fused qkv) and out; a whole "
    "nn.MultiheadAttention",
    "qkv": "the projections into attention",
    "mlp": "the two (or three) layers of each MLP",
    "conv": "convolutions outside patch embedding and head",
    "linear": "fully connected layers outside the head",
    "norm": "normalisation layers",
    "head": "the classifier",
    "block": "the repeated blocks",
}


@dataclass(frozen=True)
class View:
    """What a model consists of; every entry is a path for `model.get_submodule`, in order of
    execution.

    Attributes:
        library: The package of the model's class.
        example: The images (batch, channels, height, width) it was traced on.
        attention: Projections and heads of each attention.
        mlps: The layers of each MLP.
        convs: Convolutions.
        linears: Fully connected layers.
        norms: Normalisation layers.
        heads: The last layers before the logits.
        classifier: The modules around them that read one vector per image, of one layer or several.
        blocks: The repeated blocks.
        patch_embed: The layer that makes patches, if one does.
        prefix_tokens: Class, distillation and register tokens joined to the patches.
        flags: Of "windowed", "rope", "fixed_grid", "batch_dependent", "batch_norm".
        functional: Layers whose weight is read by another module.
        computed: Layers that use something computed from their weight (standardised).
        layouts: Shapes in and out of blocks, attentions, MLPs and their first and last layers.
        prefix_position: "before" or "behind" the patches.
        pooling: What the classifier gets of the positions: "mean", "max", "attention", "prefix
            token".
    """

    library: str
    example: Tensor = field(repr=False, compare=False)
    attention: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    convs: tuple[str, ...]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    heads: tuple[str, ...]
    classifier: tuple[str, ...]
    blocks: tuple[str, ...]
    patch_embed: str | None
    prefix_tokens: int
    flags: frozenset[str]
    functional: frozenset[str] = frozenset()
    computed: frozenset[str] = frozenset()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    prefix_position: str = ""
    pooling: str = ""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.example.shape[1:]
        return channels, height, width

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The blocks in runs of one width and resolution, in order: one run for a plain vision
        transformer."""
        runs: list[list[str]] = []
        before = None
        for block in self.blocks:
            now = self.layouts[block].output if block in self.layouts else None
            if not runs or now != before:
                runs.append([])
            runs[-1].append(block)
            before = now
        return tuple(tuple(run) for run in runs)

    def in_classifier(self, path: str) -> bool:
        """Whether a module or parameter belongs to the classifier."""
        return any(path == c or path.startswith(c + ".") for c in self.classifier)

    def role(self, name: str) -> tuple[str, ...]:
        """Return the paths that play a role.

        Args:
            name: One of `ROLES`.

        Returns:
            Paths of modules.

        Raises:
            BadInput: For an unknown role, or one that nothing plays here.
        """
        if name not in ROLES:
            raise BadInput(f"unknown role '{name}'{nearest(name, ROLES)}")
        paths = self._role(name)
        if not paths:
            have = {r: len(self._role(r)) for r in ROLES}
            roles = ", ".join(f"{n} {r}" for r, n in have.items() if n) or "none of the known roles"
            raise BadInput(f"this model has no '{name}' ({ROLES[name]}); it has {roles}")
        return paths

    def _role(self, name: str) -> tuple[str, ...]:
        match name:
            case "qkv":
                return unique(
                    p
                    for a in self.attention
                    for p in ((a.path,) if a.kind == "multihead" else a.inputs)
                )
            case "attention":
                return unique(
                    p
                    for a in self.attention
                    for p in (
                        (a.path,)
                        if a.kind == "multihead"
                        else (*a.inputs, *((a.out,) if a.out else ()))
                    )
                )
            case "mlp":
                layers = (p for m in self.mlps for p in (m.up, m.gate, m.down) if p is not None)
                return unique(p for p in layers if not self.in_classifier(p))
            case "conv":
                return tuple(
                    p for p in self.convs if not self.in_classifier(p) and p != self.patch_embed
                )
            case "linear":
                return tuple(p for p in self.linears if not self.in_classifier(p))
            case "norm":
                return self.norms
            case "head":
                return self.heads
            case _:
                return self.blocks


_KNOWN = WeakIdKeyDictionary()


@contextmanager
def known(model: nn.Module, structure: View) -> Iterator[None]:
    """Let `view(model)` return `structure` within the block, whatever is asked: for one who vouches
    that the model is built like its own.

    Args:
        model: The model.
        structure: What `view` is to return.
    """
    _KNOWN[model] = structure
    try:
        yield
    finally:
        del _KNOWN[model]


def view(
    model: nn.Module, example: Tensor | tuple[int, int, int] | None = None, probe: bool = True
) -> View:
    """Find the parts of a model, which stays bit for bit as it is.

    Args:
        model: The model.
        example: Images (batch, channels, height, width), or one image's shape; inferred where
            absent.
        probe: Also run the two further forwards that the flags "fixed_grid" and "batch_dependent"
            need.

    Returns:
        The model's structure.

    Raises:
        BadInput: Where a forward fails, with what it ran on.
    """
    if model in _KNOWN:
        return _KNOWN[model]
    example = image(model, example) if isinstance(example, tuple) else example
    traced = trace(model, example) if example is not None else trace_any(model)
    linears = [c for c in traced.calls if c.kind == "linear"]
    convs = [c for c in traced.calls if c.kind == "conv"]
    functional = frozenset(c.path for c in (*linears, *convs) if c.functional)
    attention = unique(parts.attention(model, call, functional) for call in traced.attentions)
    mlps = parts.mlps(traced)
    flags = parts.flags(model, traced)
    if probe:
        flags |= _probe(model, traced)
    patch_embed = parts.patch_embed(traced, bool(attention or mlps))
    blocks, heads = parts.blocks(model, traced), parts.heads(traced)
    prefix = 0 if "windowed" in flags else parts.prefix_tokens(traced, patch_embed)
    laid = [
        *blocks,
        *(p for a in attention for p in (a.path, a.out)),
        *(p for m in mlps for p in (m.path, m.up, m.down)),
    ]
    return View(
        library=type(model).__module__.partition(".")[0],
        example=traced.input,
        attention=attention,
        mlps=mlps,
        convs=unique(c.path for c in convs),
        linears=unique(c.path for c in linears),
        norms=unique(c.path for c in traced.calls if c.kind == "norm"),
        heads=heads,
        classifier=parts.classifier(traced, heads),
        blocks=blocks,
        patch_embed=patch_embed,
        prefix_tokens=prefix,
        flags=frozenset(flags),
        functional=functional,
        computed=frozenset(c.path for c in (*linears, *convs) if not c.direct),
        layouts=layouts(traced, unique(p for p in laid if p)),
        prefix_position=parts.prefix_position(traced, prefix),
        pooling=parts.pooling(traced, heads, blocks, prefix),
    )


def example_input(model: nn.Module, size: Any = None) -> Tensor:
    """Return an image batch that a model takes, on its device and in its precision.

    Args:
        model: The model.
        size: Side, or (height, width), in pixels; as the model's configuration says, or by trial,
            where it is absent.

    Returns:
        (1, channels, height, width).

    Raises:
        BadInput: With the sizes that were tried, or where the model does not take images of this
            one.
    """
    example = trace_any(model).input
    height, width = (
        tuple(example.shape[2:])
        if size is None
        else (size, size)
        if isinstance(size, int)
        else tuple(size)
    )
    if tuple(example.shape[2:]) == (height, width):
        return example
    return trace(model, image(model, (example.shape[1], height, width))).input


def reached(
    model: nn.Module, example: Tensor, among: Collection[str] | None = None
) -> frozenset[str]:
    """Return the parameters that a gradient of the outputs reaches: what could learn.

    Args:
        model: The model.
        example: Images (batch, channels, height, width).
        among: Names of the parameters to ask about; all where absent.

    Returns:
        Names of parameters.
    """
    everything = dict(model.named_parameters())
    named = {
        n: p
        for n, p in everything.items()
        if p.is_floating_point() and (among is None or n in among)
    }
    flags = [(p, p.requires_grad) for p in everything.values()]
    try:
        with probing(model), torch.enable_grad():
            for name, parameter in everything.items():
                parameter.requires_grad_(name in named)
            outputs = [t for t in tensors_in(_plain(model(example))) if t.requires_grad]
            total = torch.stack([t.float().sum() for t in outputs]).sum() if outputs else None
            grads = []
            if total is not None:
                grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return frozenset(n for n, g in zip(named, grads, strict=False) if g is not None)


def _probe(model: nn.Module, traced: Trace) -> set[str]:
    """Find by two more forwards whether another image size is refused, and whether the rest of a
    batch matters."""
    x = traced.input
    if x.device.type == "meta":
        return set()
    flags = set()
    size = tuple(s // 2 if s >= 64 else s * 2 for s in x.shape[-2:])
    with probing(model):
        try:
            model(torch.nn.functional.interpolate(x.float(), size).to(x.dtype))
        except Exception:  # whatever a library raises here means: not this size
            flags.add("fixed_grid")
        alone = next(tensors_in(_plain(model(x[:1]))), None)
        beside = next(tensors_in(_plain(model(torch.cat([x[:1], 1 - x[:1].flip(-1)])))), None)
    if (
        alone is not None
        and beside is not None
        and not torch.allclose(alone[0], beside[0], rtol=1e-2, atol=1e-3)
    ):
        flags.add("batch_dependent")
    return flags


def _plain(output: object) -> object:
    to_tuple: Any = getattr(output, "to_tuple", None)
    return output if to_tuple is None else to_tuple()
