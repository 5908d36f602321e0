"""A side network computes the ladder, learns whole, and keeps the backward out of the base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.lora import Lora
from greenvis.techniques.iteration.peft.side import Ladder, Side


def _randomised(ladder: Ladder) -> None:
    with torch.no_grad():
        for parameter in ladder.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)


def _attend(layer: Any, x: Tensor) -> Tensor:
    """A pre-norm transformer block, written out."""
    normed = F.layer_norm(x, x.shape[-1:], layer.norm1.weight, layer.norm1.bias)
    attention = layer.self_attn
    q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    heads = attention.num_heads
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mixed = (
        ((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    )
    x = x + attention.out_proj(mixed)
    return x + layer.linear2(
        F.gelu(layer.linear1(F.layer_norm(x, x.shape[-1:], layer.norm2.weight, layer.norm2.bias)))
    )


@pytest.mark.parametrize("every", [1, 2])
def test_is_the_ladder_of_the_paper(every: int) -> None:
    model, seen, x = HOSTS["timm-vit"].build().eval(), {}, torch.rand(2, 3, 32, 32)
    model.blocks[0].register_forward_pre_hook(lambda m, i: seen.update({-1: i[0]}))
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, o, i=i: seen.update({i: o}))
    wrap(model, Side(reduction=2, every=every))
    ladder = model.blocks[2].side
    _randomised(ladder)
    model.blocks[2].register_forward_hook(lambda m, a, o: seen.update(joined=o))
    with torch.no_grad():
        model(x)
        h = ladder.enter(seen[-1])
        for i, block in enumerate([0, 1, 2] if every == 1 else [0, 2]):
            mu = 1 / (1 + torch.exp(-ladder.gates[i] / 0.1))
            h = _attend(ladder.layers[i], mu * ladder.downs[i](seen[block]) + (1 - mu) * h)
        want = seen[2] + ladder.up(
            F.layer_norm(h, h.shape[-1:], ladder.norm.weight, ladder.norm.bias)
        )
    assert h.shape == (2, 17, 16)
    assert torch.allclose(seen["joined"], want, atol=1e-4)
    assert not ladder.inputs


def _step_flops(technique: Any) -> int:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, technique)
    x, y = HOSTS["timm-vit"].batch()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    live.undo()
    return counter.get_total_flops()


def test_the_backward_stays_out_of_the_base() -> None:
    model, needs = HOSTS["timm-vit"].build(), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, o: needs.append(o.requires_grad))
    wrap(model, Side(reduction=4))
    needs.clear()  # the install looked too
    model(HOSTS["timm-vit"].batch()[0])
    assert needs == [False, False, False]
    side, bottleneck, low_rank = (
        _step_flops(t) for t in (Side(reduction=8), Adapter(width=4), Lora(rank=2))
    )
    assert side < 0.8 * min(bottleneck, low_rank)


@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-eva02", "torchvision-vit", "transformers-dinov2"]
)
def test_starts_neutral_learns_whole_and_undoes(name: str) -> None:
    model = HOSTS[name].build()
    before, keys = Snapshot(model), list(model.state_dict())
    images, labels = HOSTS[name].batch()

    def logits() -> Tensor:
        out = model(images)
        return getattr(out, "logits", out)

    model.eval()
    start = logits()
    live = wrap(model, Side(reduction=2))
    assert torch.allclose(
        logits(), start, atol=1e-6
    )  # torchvision's takes another path when nothing in it trains
    moved = set()
    optimizer = torch.optim.SGD(live.param_groups(0.5))
    for _ in range(3):
        model.train()
        F.cross_entropy(logits(), labels).backward()
        moved |= {
            n for n, p in live.trainable.items() if p.grad is not None and p.grad.abs().max() > 0
        }
        optimizer.step()
        optimizer.zero_grad()
    assert moved == set(live.trainable)
    with pytest.raises(GreenvisError, match="cannot be merged: a side network"):
        live.merge()
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_checkpointing_and_a_deep_copy() -> None:
    model, (x, _) = HOSTS["timm-vit"].build(), HOSTS["timm-vit"].batch()
    live = wrap(model, Side(reduction=2))
    _randomised(model.blocks[2].side)
    model(x).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in live.trainable.items() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    assert all(
        torch.allclose(p.grad, plain[n], rtol=1e-3, atol=1e-4) for n, p in live.trainable.items()
    )
    twin = copy.deepcopy(model).eval()
    before = twin(x)
    assert torch.equal(model.eval()(x), before)
    _randomised(model.blocks[2].side)
    assert torch.equal(twin(x), before)
    assert not torch.allclose(model(x), before, atol=1e-3)


def test_goes_with_lora_which_leaves_the_ladder_alone() -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, [Side(reduction=4), Lora(rank=2)])
    assert any("lora_A" in n for n in live.trainable)
    assert not any("lora" in n for n, _ in model.blocks[2].side.named_parameters())


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        ("timm-resnet", {}, "reads the tokens of attention blocks, and ResNet has none"),
        ("timm-swin", {}, "do not all take and give one sequence"),
        ("plain", {}, "does not show its attention as a row of blocks"),
        ("timm-vit", {"every": 4}, "every is 4, but VisionTransformer has 3 blocks"),
        ("timm-vit", {"reduction": 64}, "have width 32: give less"),
    ],
)
def test_refusals_change_nothing(name: str, request_: dict[str, Any], says: str) -> None:
    model = HOSTS[name].build()
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, Side(input_shape=HOSTS[name].input_shape, **request_))


def test_refuses_nonsense() -> None:
    for wrong in ({"reduction": 0}, {"every": 0}, {"head": "fly"}, {"width": 4}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Side(**wrong)  # type: ignore[arg-type]
