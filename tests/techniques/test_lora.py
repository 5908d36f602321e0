"""LoRA equals PEFT's own, learns wherever weights are read, merges exactly, and refuses what it
cannot do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.peft.lora import Lora

DATA = Path(__file__).parents[1] / "fixtures"


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(x.flatten(1)[:, :12])))


def _train(live: Any, x: Tensor, steps: int = 2, lr: float = 0.05) -> None:
    live.model.train()
    optimizer = torch.optim.SGD(live.param_groups(lr))
    for _ in range(steps):
        out = live.model(x)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    live.model.eval()


def test_equals_peft_on_the_fixture() -> None:
    row = torch.load(DATA / "lora_peft.pt", weights_only=True)["rows"][0]
    model = _Two()
    model.load_state_dict(row["base"])
    request = Lora(
        rank=row["r"],
        alpha=row["lora_alpha"],
        targets=("fc",),
        head="freeze",
        input_shape=(1, 3, 4),
    )
    live = wrap(model, request)
    assert sum(p.numel() for p in live.trainable.values()) == row["trainable_params"]
    with torch.no_grad():
        model.fc.lora_A["default"].weight.copy_(row["A"])
        model.fc.lora_B["default"].weight.copy_(row["B"])
    assert torch.allclose(model(row["x"]), row["y"], atol=1e-5, rtol=1e-4)
    live.merge()
    assert type(model.fc) is nn.Linear
    assert torch.allclose(model.fc.weight, row["merged_weight"], atol=1e-6, rtol=1e-6)
    assert torch.allclose(model(row["x"]), row["y_merged"], atol=1e-5, rtol=1e-4)
    exact = row["base"]["fc.weight"].double() + row["scaling"] * (
        row["B"].double() @ row["A"].double()
    )
    assert (model.fc.weight - exact).norm() / exact.norm() < 1e-6


def test_a_bf16_base_merges_in_fp32() -> None:
    model = HOSTS["timm-vit"].build().to(torch.bfloat16)
    base = {n: p.double() for n, p in model.named_parameters()}
    live = wrap(model, Lora(rank=4))
    _train(live, torch.rand(4, 3, 32, 32).bfloat16(), lr=0.5)
    layer = model.blocks[0].attn.qkv
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = base["blocks.0.attn.qkv.weight"] + b @ a
    live.merge()
    merged = model.blocks[0].attn.qkv.weight
    assert merged.dtype == torch.float32
    assert (merged - exact).norm() / exact.norm() < 1e-6
    assert model(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    live.undo()
    assert {n: p.dtype for n, p in model.named_parameters()} == dict.fromkeys(base, torch.bfloat16)
    assert all(torch.equal(p.double(), base[n]) for n, p in model.named_parameters())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_variants_start_neutral(variant: Any, init: Any) -> None:
    model = HOSTS["timm-vit"].build().eval()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    live = wrap(model, Lora(rank=2, variant=variant, init=init, head="freeze"))
    assert (model(x) - before).abs().max() <= 1e-5
    _train(live, x)
    moved = model(x)
    assert (moved - before).abs().max() > 1e-5
    live.merge().eval()
    assert (model(x) - moved).abs().max() <= 1e-5
    live.undo()
    assert torch.equal(model.eval()(x), before)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("torchvision-swin", "attention"),
        ("torchvision-vit", "attention"),
        ("plain", "attention"),
        ("plain", "mlp"),
    ],
)
def test_weights_that_others_read_learn(name: str, target: str) -> None:
    """The traps: torchvision's Swin reads qkv and proj itself, nn.MultiheadAttention its out_proj,
    an encoder layer all."""
    model = HOSTS[name].build()
    live = wrap(model, Lora(rank=2, targets=(target,), head="freeze", input_shape=(3, 32, 32)))
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    x = torch.rand(4, 3, 32, 32)
    before = copy.deepcopy(live.trainable)
    _train(live, x)
    assert all(not torch.equal(p, before[n]) for n, p in live.trainable.items() if "lora_B" in n)
    assert all(
        torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base
    )  # no drift of the frozen base
    with torch.no_grad():  # torch's fast paths run here, and must see the change too
        fast = model(x)
        live.merge().eval()
        assert torch.allclose(fast, model(x), atol=1e-5)


def test_the_head_trains_or_not() -> None:
    live = wrap(HOSTS["timm-deit-distilled"].build(), Lora(rank=2))
    assert {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"} <= set(live.trainable)
    live.undo()
    live = wrap(live.model, Lora(rank=2, head="freeze"))
    assert all("lora_" in n for n in live.trainable)


def test_frozen_batch_norm_stays() -> None:
    model = HOSTS["timm-resnet"].build()
    live = wrap(model, Lora(rank=2, targets=("conv",), input_shape=(3, 64, 64)))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    live.undo()
    model.train()
    model(torch.rand(4, 3, 64, 64))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_a_shared_module_is_changed_everywhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(48, 48)
            self.two = nn.Sequential(nn.ReLU(), self.one)
            self.head = nn.Linear(48, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x.flatten(1))))

    model = Shared()
    keys = list(model.state_dict())
    live = wrap(model, Lora(rank=2, targets=("linear",), input_shape=(3, 4, 4)))
    assert model.one is model.two[1]
    assert hasattr(model.one, "lora_A")
    _train(live, torch.rand(4, 3, 4, 4))
    moved = model(torch.ones(1, 3, 4, 4))
    live.merge().eval()
    assert list(model.state_dict()) == keys
    assert model.one is model.two[1]
    assert torch.allclose(model(torch.ones(1, 3, 4, 4)), moved, atol=1e-6)


def test_lora_plus_gives_b_its_own_rate() -> None:
    live = wrap(HOSTS["timm-vit"].build(), Lora(rank=2, lr_ratio=16.0))
    groups = live.param_groups(1e-3)
    assert [g["lr"] for g in groups] == [pytest.approx(1.6e-2), 1e-3]
    assert len(groups[0]["params"]) == 6


def test_patterns() -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, Lora(rank=2, targets=("qkv", "proj"), head="freeze"))
    assert not hasattr(model.patch_embed.proj, "lora_A")  # named by accident only
    assert hasattr(model.blocks[2].attn.proj, "lora_A")
    live.undo()
    wrap(model, Lora(rank=2, targets=("patch_embed.proj",)))
    assert hasattr(model.patch_embed.proj, "lora_A")


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        (
            "timm-vit",
            {"targets": ["atn.*"]},
            r"no Linear matches 'atn\.\*'; this model has 'blocks\.0\.attn\.qkv'.*\(\+7\)",
        ),
        ("timm-vit", {"targets": ["atention"]}, "did you mean 'attention'"),
        ("timm-vit", {"targets": ["head"]}, "trains in full; set head: freeze"),
        ("timm-resnet", {}, "has no 'attention'"),
        ("torchvision-vit", {"variant": "dora"}, "no DoRA; use variant lora"),
        ("torchvision-swin", {"dropout": 0.1}, "set dropout: 0"),
        (
            "torchvision-vit",
            {"targets": ["*out_proj"]},
            "is read as a weight by its nn.MultiheadAttention",
        ),
        ("timm-efficientnet-lite", {"targets": ["conv_dw"]}, r"convolution of \d+ groups"),
        ("timm-convnext", {"targets": ["conv"], "init": "pissa"}, "PEFT cannot"),
    ],
)
def test_refusals_change_nothing(name: str, request_: dict[str, Any], says: str) -> None:
    model = HOSTS[name].build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(BadInput, match=says):
        wrap(model, Lora(rank=3, input_shape=HOSTS[name].input_shape, **request_))
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_grouped_convolution_is_not_merged() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2)
    )
    live = wrap(model, Lora(rank=4, targets=("0",), input_shape=(4, 8, 8)))
    with pytest.raises(GreenvisError, match="grouped convolutions"):
        live.merge()
    live.undo()
    assert type(model[0]) is nn.Conv2d


def test_refuses_nonsense() -> None:
    for wrong in (
        {"rank": 0},
        {"variant": "lorra"},
        {"dropout": 1.0},
        {"targets": []},
        {"ranks": 4},
    ):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Lora(**wrong)  # type: ignore[arg-type]
