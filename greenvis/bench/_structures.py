"""The networks of `greenvis bench structure`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greenvis import models
from greenvis.core.wrap import wrap
from greenvis.models.folding import fold_norms
from greenvis.models.fusing import fuse
from greenvis.techniques import registry

PLAIN = "plain"


@dataclass(frozen=True)
class Arm:
    """One network as it is served.

    Attributes:
        model: In eval mode.
        within: Makes the context it is served in.
        keeps: Whether its answers are meant to be the first arm's.
        last: Whether images lie channels last.
    """

    model: nn.Module
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    keeps: bool = False
    last: bool = False


Arms = dict[str, Arm]


@dataclass(frozen=True)
class Group:
    """Networks that are compared with the first of them.

    Attributes:
        name: In the table.
        side: Of an image, in pixels.
        batch: The larger batch.
        arms: Builds them.
        turns: Of the settings in a round, at the larger batch: more where calls are short, or
            ratios are multiplied.
    """

    name: str
    side: int
    batch: int
    arms: Callable[[int], Arms]
    turns: int = 1


def _wrapped(model: nn.Module, **techniques: Any) -> Any:
    requests = [registry.find(n).model_validate(fields) for n, fields in techniques.items()]
    return wrap(model, requests)


def _point(live: Any, name: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: live.operating_points()[name]


def _deit(side: int) -> nn.Module:
    torch.manual_seed(0)
    return models.build("timm/deit_tiny_patch16_224", img_size=side).eval()


def _precisions(model: nn.Module, suffix: str = "", last: bool = False) -> Arms:
    live = _wrapped(model, low_precision={"precisions": ["bf16", "int8"]})
    return {
        f"{name}{suffix}": Arm(model, _point(live, name), keeps=True, last=last)
        for name in ("bf16", "int8")
    }


def transformer(side: int) -> Arms:
    """DeiT-Ti: fewer bits, merged tokens, both, linear cores, experts."""
    return _few(side) | _converted(side)


def _few(side: int) -> Arms:
    """Return DeiT-Ti in fewer bits, with fewer tokens, and both."""
    arms = {PLAIN: Arm(_deit(side))} | _precisions(_deit(side))
    merged = _deit(side)
    live = _wrapped(merged, token_merge={"r": 8}, low_precision={"precisions": ["bf16", "int8"]})
    for name in ("fp32", "bf16", "int8"):
        arms[f"merge r 8, {name}"] = Arm(merged, _point(live, name))
    return arms


def int8_and_merged(side: int) -> Arms:
    """DeiT-Ti in int8, with merged tokens, and both: whether ratios multiply."""
    return {n: a for n, a in _few(side).items() if "bf16" not in n}


def _converted(side: int) -> Arms:
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        f"linear attention, {core}": ("linear_attention", {"core": core})
        for core in ("relu", "elu", "polaformer")
    }
    changes["pruned by half"] = ("prune", {"ratio": 0.5, "multiple_of": 16})
    changes["experts, 1 of 4"] = ("experts", {"experts": 4, "active": 1})
    changes["experts, 2 of 8"] = ("experts", {"experts": 8, "active": 2})
    arms = {}
    for name, (technique, fields) in changes.items():
        model = _deit(side)
        _wrapped(model, **{technique: fields})
        arms[name] = Arm(model.eval())
    return arms


class Tokens(nn.Module):
    """A part of DeiT-Ti alone, to which an image's numbers are tokens: 4 sequences of 196 of 192 at
    224 pixels."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.reshape(-1, 196 * x.shape[-1] ** 2 // 224**2, 192))


def _part(path: str) -> Callable[[int], Arms]:
    def build(side: int) -> Arms:
        arms = {PLAIN: Arm(Tokens(_deit(side).get_submodule(path)))}
        for experts, active in ((4, 1), (8, 2)):
            model = _deit(side)
            _wrapped(model, experts={"experts": experts, "active": active})
            part = Tokens(model.eval().get_submodule(path))
            arms[f"experts, {active} of {experts}"] = Arm(part)
        rest: Any = _deit(side).get_submodule(path)
        if hasattr(rest, "mlp"):  # what no expert can save
            rest.mlp = nn.Identity()
            arms["without its MLP"] = Arm(Tokens(rest))
        return arms

    return build


def many_tokens(side: int) -> Arms:
    """DeiT-Ti on larger images: 1,025 tokens."""
    return {PLAIN: Arm(_deit(side))} | _converted(side)


def convolutions(side: int) -> Arms:
    """A ResNet-26 of bottlenecks, and what it becomes, norms folded but in the first."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return models.build("timm/resnet26").eval()

    arms = {PLAIN: Arm(build()), "norms folded": Arm(_fused(build()), keeps=True)}
    live = _wrapped(build(), reparam={})
    arms["reparam, folded"] = Arm(_fused(live.merge().eval()), keeps=True)
    for name, fields in (
        ("res2net, keep, s 4", {"scale": 4}),
        ("res2net, equal MACs, s 4", {"scale": 4, "width": "equal"}),
    ):
        model = build()
        _wrapped(model, res2net=fields)
        fold_norms(model.eval())
        arms[name] = Arm(model)
    live = _wrapped(build(), prune={"ratio": 0.5, "multiple_of": 8})
    arms["pruned by half"] = Arm(_fused(live.merge().eval()))
    live = _wrapped(build(), rfnext={"epochs": 1, "every": 1})
    live.epoch_end()
    arms["rfnext, single"] = Arm(_fused(live.merge().eval()))
    return arms


def _fused(model: nn.Module) -> nn.Module:
    fuse(model)
    return model


BRANCHED = ("repvgg_a0", "mobileone_s0", "repvit_m1", "fastvit_t8", "efficientvim_m1")


def _branches(name: str) -> Callable[[int], Arms]:
    def build(side: int) -> Arms:
        torch.manual_seed(0)
        branched = models.build(f"timm/{name}").eval()
        torch.manual_seed(0)
        folded = models.build(f"timm/{name}").eval()
        fuse(folded, torch.rand(1, 3, side, side))
        return {"as it trains": Arm(branched), "folded": Arm(folded, keeps=True)}

    return build


def lite0(side: int) -> Arms:
    """EfficientNet-Lite0 with ImageNet weights, its norms folded: fewer bits, channels last."""

    def build(last: bool = False) -> nn.Module:
        model = models.build("timm/tf_efficientnet_lite0", pretrained="efficientnet-lite0").eval()
        fuse(model)
        return model.to(memory_format=torch.channels_last) if last else model

    arms = {PLAIN: Arm(build())} | _precisions(build())
    arms["fp32, channels last"] = Arm(build(True), keeps=True, last=True)
    return arms | _precisions(build(True), ", channels last", last=True)


GROUPS = (
    Group("DeiT-Ti, 197 tokens", 224, 16, transformer),
    Group("DeiT-Ti, int8 and merged tokens", 224, 16, int8_and_merged, 4),
    Group("MLP of DeiT-Ti, 196 tokens", 224, 4, _part("blocks.0.mlp"), 20),
    Group("block of DeiT-Ti, 196 tokens", 224, 4, _part("blocks.0"), 20),
    Group("DeiT-Ti, 1025 tokens", 512, 4, many_tokens),
    Group("EfficientNet-Lite0, ImageNet weights", 224, 16, lite0),
    Group("ResNet-26", 112, 64, convolutions),
    *(Group(name, 224, 16, _branches(name)) for name in BRANCHED),
)
