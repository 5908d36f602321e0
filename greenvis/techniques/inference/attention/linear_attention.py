"""Linear attention: softmax attention of a trained model replaced by sums over tokens."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.core.surgery import find, names_of, replace
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, some
from greenvis.models.structure import View, view
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.attention._alignment import Alignment, least_harmful
from greenvis.techniques.inference.attention._cores import Core
from greenvis.techniques.inference.attention._modules import (
    LocalConv,
    OwnAttention,
    Softmax,
    new_gate,
    own_attention,
)


class LinearAttention(Technique):
    """Replace softmax attention by sums over tokens, whose cost grows with the number of tokens and
    not with its square (Katharopoulos et al., 2020; RFA: Peng et al., 2021; PolaFormer: Meng et
    al., 2025; Hedgehog: Zhang et al., 2024; EfficientViM: Lee et al., 2025; ToST: Wu et al., 2025).

    Saves at inference and in training where there are many tokens: below about 500 softmax's fused
    kernel is the quicker, and the technique says so, from a measurement of both on this machine.
    The answers change, so train on, or distil from the original; `align` epochs before that each
    attention learns what the original one answers to the original's inputs (Hedgehog, section 4.2),
    at the cost of a forward and the attentions' backward. A small transformer of 1,025 tokens was
    converted so in three epochs, for 0.26 of the joules of training the linear one from scratch,
    within 0.4 points of its teacher on each of three seeds, and takes 0.35 of its joules per image
    (reports/structure-linear-attention). `core: relu` and `elu` have no
    weights of their own, `polaformer` keeps signs (with `conv: 5` and `gate` it is the published
    layer; both change nothing at first), `hedgehog` and `ssd` learn maps, `rfa` has
    random features; `tssa` reads the values' projection alone and is to be trained anew. The
    projections, norms and their names stay. Attention that rotates or biases by position, or
    attends in windows, is refused, as is a mask that is not the same for all queries; a mask of
    keys is a weight of each key. Sums are in float32.

    Example:
        >>> live = gv.wrap(model, gv.LinearAttention(core="relu"))
        >>> live.facts()["linear_attention"]["tokens"]
        17
        >>> live.undo() is model
        True
    """

    name = "linear_attention"
    stage = "base"
    order = 1
    needs = frozenset({"trainable_base"})
    breaks = frozenset({"attention_maps"})
    examples = (
        {},
        {"core": "elu"},
        {"core": "rfa", "features": 8},
        {"core": "polaformer", "conv": 3, "gate": True},
        {"core": "hedgehog", "align": 1},
        {"core": "ssd"},
        {"core": "tssa"},
    )
    neutral = None
    nothing = {"targets": ["no_such_attention"]}

    core: Literal["elu", "relu", "rfa", "polaformer", "hedgehog", "ssd", "tssa"] = Field(
        default="relu", description="what takes softmax's part"
    )
    features: int = Field(default=32, ge=1, description="random directions of rfa, per head")
    conv: int = Field(
        default=0,
        ge=0,
        le=31,
        description="side of a depthwise convolution of the values beside the core, odd; 5 in "
        "PolaFormer, 0 for none",
    )
    gate: bool = Field(
        default=False, description="a gate of each token on what both give, as in PolaFormer"
    )
    align: int = Field(
        default=0,
        ge=0,
        description="epochs at the beginning in which attentions alone learn, from the original's",
    )
    targets: list[str] | None = Field(
        default=None, description="shell patterns on attentions' paths; default all"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Replace attentions. Raises BadInput for a model without any, or with one that does more
        than attend."""
        structure = view(model, self.input_shape, probe=False)
        chosen = self._attentions(model, structure)
        twins = {a.path: own_attention(model, a, structure.example) for a in chosen}
        originals = {p: copy.deepcopy(model.get_submodule(p)) for p in twins if self.align}
        added: list[nn.Parameter] = []
        for attention in chosen:
            twin = twins[attention.path]
            old = model.get_submodule(attention.path)
            weight = next(p for p in old.parameters() if p.dim() > 1)
            dim = _width(twin, attention.heads)
            if self.core == "polaformer" and dim % 2:
                raise BadInput(f"polaformer needs heads of even width, not {dim}: use another core")
            twin.core = Core(self.core, attention.heads, dim, self.features, weight.detach())
            self._extend(twin, structure, dim, weight.detach())
            added += [
                p for m in (twin.core, twin.local_conv, twin.out_gate) if m for p in m.parameters()
            ]
            replace(model, old, twin.train(old.training))
        if added:
            check_runs(model, structure.example, added, f"the core {self.core}")
        first = next(iter(twins.values()))
        tokens = _tokens(model, first, structure.example)
        live = InstalledLinearAttention(self, [*twins], first, tokens, names_of(model, added))
        if self.align:
            live.alignment = Alignment(model, [(twins[p], originals[p]) for p in twins])
        return live

    def _extend(self, twin: OwnAttention, structure: View, dim: int, like: Tensor) -> None:
        """Put the convolution and the gate beside a core."""
        height, width = structure.example.shape[-2:]
        if self.conv:
            if self.conv % 2 == 0 or structure.prefix_position == "behind":
                why = f"its side is {self.conv}, and must be odd"
                if self.conv % 2:
                    why = "class tokens stand behind the patches here"
                raise BadInput(f"a convolution of the values has no grid: {why}")
            prefix = structure.prefix_tokens
            twin.local_conv = LocalConv(self.conv, prefix, height / width, dim, like)
        if self.gate:
            twin.out_gate = new_gate(_input_width(twin), twin.heads * dim, like)

    def choose(self, model: nn.Module, x: Tensor, count: int) -> LinearAttention:
        """Return the request for those attentions alone whose conversion changes the answers
        least, greedily; n of N take about n · N forwards.

        Args:
            model: The model, which stays as it is.
            x: Images (batch, channels, height, width) held out from training.
            count: How many attentions to convert.

        Returns:
            The request with `targets` set.

        Raises:
            BadInput: Where the model does not fit, or has not so many attentions.
        """
        live = wrap(model, self)
        try:
            paths = live.facts()["linear_attention"]["attentions"]
            if not 1 <= count <= len(paths):
                raise BadInput(f"count is {count}, of {len(paths)} attentions")
            converted: dict[str, Any] = {p: model.get_submodule(p) for p in paths}
            targets = least_harmful(model, converted, x, count)
        finally:
            live.undo()
        return self.model_copy(update={"targets": targets})

    def _attentions(self, model: nn.Module, structure: View) -> list[Any]:
        what = type(model).__name__
        if not structure.attention:
            raise BadInput(f"{what} has no attention to convert")
        chosen = list(structure.attention)
        if self.targets is not None:
            paths = find(model, self.targets, nn.Module)
            chosen = [a for a in chosen if a.path in paths]
            if not chosen:
                raise BadInput(
                    f"none of {some(self.targets)} is an attention of {what}; it has "
                    f"{some(a.path for a in structure.attention)}"
                )
        return chosen


class InstalledLinearAttention(Installed):
    """Linear attention in a live model. tokens: how many an image has at the first of them."""

    unmergeable = (
        "no weights of softmax attention give what it gives; keep the model wrapped, it is as "
        "quick as the core is"
    )

    def __init__(
        self,
        request: LinearAttention,
        paths: list[str],
        first: OwnAttention,
        tokens: int,
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable)
        self.request, self.paths, self.first, self.tokens = request, paths, first, tokens
        self.ratio: float | None = None
        self.alignment: Alignment | None = None
        self.epoch = 0

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return how far the attentions are from the original ones, while they are aligned: the
        squared error as a share of the variance."""
        if self.alignment is None or not self.alignment.losses:
            return {}
        return {"align": torch.stack(self.alignment.losses).mean()}

    def step_end(self) -> None:
        """Let go of the step's losses, which no copy of the model could take along."""
        if self.alignment is not None:
            self.alignment.losses.clear()

    def epoch_end(self) -> None:
        """End the alignment after its epochs."""
        self.epoch += 1
        if self.epoch >= self.request.align:
            self._end()

    def _end(self) -> None:
        if self.alignment is not None:
            self.alignment.end()
        self.alignment = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the epochs so far, of an alignment."""
        return {"epoch": torch.tensor(self.epoch)} if self.request.align else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where an alignment was."""
        if not self.request.align:
            return super().load_state_dict(state)
        self.epoch = int(state["epoch"])
        if self.epoch >= self.request.align:
            self._end()

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Before the first step say whether the core pays at this number of tokens."""
        if self.ratio is None:
            self.ratio = core_time(self.first, self.tokens)
            if self.ratio > 1:
                self.note(
                    f"{self.request.core} attention takes {self.ratio:.2g} times softmax's time "
                    f"at {self.tokens} tokens on this machine: it saves nothing here"
                )
        return x, y

    def facts(self) -> Mapping[str, Any]:
        """Return which attentions were converted, at how many tokens, and the measured ratio of the
        cores' times (None before the first step)."""
        about = {"attentions": self.paths, "tokens": self.tokens, "core_time_ratio": self.ratio}
        return {"linear_attention": about}


@torch.no_grad()
def core_time(attention: OwnAttention, tokens: int, rounds: int = 5) -> float:
    """Return the time of an attention's core as a share of that of fused softmax, both on random
    tokens of one image, alternating.

    Args:
        attention: The converted attention.
        tokens: Tokens per image.
        rounds: Repetitions; their median counts.

    Returns:
        Below 1 where the core is the quicker.
    """
    weight = next(p for p in attention.parameters() if p.dim() > 1)
    dim = _width(attention, attention.heads)
    qkv = torch.randn(3, 1, attention.heads, tokens, dim).to(weight)
    times: dict[bool, list[float]] = {True: [], False: []}
    softmax = Softmax()
    for _ in range(rounds + 1):
        for own, core in ((True, attention.core), (False, softmax)):
            _finish(weight)
            start = time.perf_counter()
            core(*qkv)
            _finish(weight)
            times[own].append(time.perf_counter() - start)
    one, other = (statistics.median(times[own][1:]) for own in (True, False))
    return one / other


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _width(attention: OwnAttention, heads: int) -> int:
    """Return the width of a head: of the first row of a weight that makes queries."""
    name = attention.local["qkv"] or attention.local["q"]
    if attention.multihead:
        weight: Any = attention.in_proj_weight
        return weight.shape[0] // 3 // heads
    layer: Any = attention.get_submodule(str(name))
    return layer.out_features // (3 if attention.local["qkv"] else 1) // heads


def _input_width(attention: OwnAttention) -> int:
    """Return the channels of the tokens an attention takes."""
    name = attention.local["qkv"] or attention.local["q"]
    if attention.multihead:
        weight: Any = attention.in_proj_weight
        return weight.shape[1]
    layer: Any = attention.get_submodule(str(name))
    return layer.in_features


def _tokens(model: nn.Module, attention: OwnAttention, x: Tensor) -> int:
    sizes: list[int] = []
    hook = attention.core.register_forward_pre_hook(
        lambda module, args: sizes.append(args[1].shape[-2])
    )
    with removing([hook]), probing(model):
        model(x)
    return sizes[0]
