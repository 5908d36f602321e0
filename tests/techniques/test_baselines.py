"""The cheap baselines train what they say, freeze the rest and its statistics, and say what they
miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import HOSTS
from torch import nn

from greenvis.core.technique import Technique, logits_of
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.techniques.iteration.peft.bitfit import Bitfit
from greenvis.techniques.iteration.peft.linear_probe import LinearProbe
from greenvis.techniques.iteration.peft.norm_tune import NormTune
from greenvis.techniques.iteration.peft.partial import Partial


def _learned(name: str, technique: Technique) -> set[str]:
    return set(wrap(HOSTS[name].build(), technique).trainable)


def test_what_trains() -> None:
    head = {"head.weight", "head.bias"}
    names = {n for n, _ in HOSTS["timm-vit"].build().named_parameters()}
    assert _learned("timm-vit", LinearProbe()) == head
    assert _learned("timm-vit", Bitfit()) == head | {n for n in names if n.endswith("bias")}
    assert _learned("timm-vit", NormTune()) == head | {n for n in names if "norm" in n}
    assert _learned("timm-vit", NormTune(head="freeze")) == {n for n in names if "norm" in n}
    assert _learned("timm-vit", Partial(blocks=2)) == head | {
        n for n in names if n.startswith(("blocks.1.", "blocks.2.", "norm."))
    }


def test_partial_takes_what_lies_between_and_behind() -> None:
    swin = _learned("timm-swin", Partial(blocks=2))
    assert {"layers.1.blocks.0.attn.qkv.weight", "norm.weight", "head.fc.weight"} <= swin
    assert not any(n.startswith(("layers.0.", "patch_embed.")) for n in swin)
    vit = _learned("torchvision-vit", Partial())
    assert "encoder.layers.encoder_layer_1.self_attention.in_proj_weight" in vit
    assert "encoder.ln.weight" in vit


def test_the_backward_of_partial_stops() -> None:
    model = HOSTS["timm-vit"].build()
    wrap(model, Partial())
    needs: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, i, o: needs.append(o.requires_grad))
    model(torch.rand(1, 3, 32, 32))
    assert needs == [False, False, True]


@pytest.mark.parametrize(
    ("technique", "moves"),
    [
        (LinearProbe(), 0),
        (Bitfit(), 0),
        (NormTune(statistics="hold"), 0),
        (NormTune(), 17),
        (Partial(), 3),
    ],
)
def test_statistics_of_batch_norms(technique: Technique, moves: int) -> None:
    """Those of frozen norms never move; those of trained ones do, unless held."""
    model = HOSTS["timm-resnet"].build()
    live = wrap(model, technique.model_copy(update={"input_shape": (3, 64, 64)}))
    before = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    model.train()
    logits_of(model(torch.rand(4, 3, 64, 64))).square().mean().backward()
    optimizer.step()
    assert (
        sum(
            not torch.equal(b, before[n])
            for n, b in model.named_buffers()
            if n.endswith("running_mean")
        )
        == moves
    )
    live.undo()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(
    ("model", "technique", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten()), Bitfit, "has no bias"),
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten()), NormTune, "no 'norm'"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), LinearProbe, "no 'head'"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), Partial, "no 'block'"),
    ],
)
def test_refusals(model: nn.Module, technique: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        wrap(model, technique(input_shape=(3, 8, 8)))
    assert all(p.requires_grad for p in model.parameters())


def test_too_many_blocks() -> None:
    with pytest.raises(BadInput, match="has 3: give 1 to 3"):
        wrap(HOSTS["timm-vit"].build(), Partial(blocks=4))
