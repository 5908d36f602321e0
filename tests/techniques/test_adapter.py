"""Adapters compute what their papers say, learn from the first step on, and leave the rest of the
model alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged
from torch import Tensor, nn

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.peft.adapter import Adapter

VARIANTS = ("houlsby", "adaptformer", "conv", "mona")


def _randomised(live: Any) -> None:
    """Give the zero-initialised projections values, so that the adapters act."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in live.trainable.items():
            if "adapter" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def _bottleneck(net: nn.Module, x: Tensor, act: Any) -> Tensor:
    down, up = net.down, net.up
    return act(x @ down.weight.T + down.bias) @ up.weight.T + up.bias  # type: ignore[operator, union-attr]


def _mona(net: Any, x: Tensor) -> Tensor:
    """The formula of the paper, on a map (batch, channels, height, width)."""
    tokens = x.permute(0, 2, 3, 1)
    tokens = (
        net.s1 * F.layer_norm(tokens, tokens.shape[-1:], net.norm.weight, net.norm.bias)
        + net.s2 * tokens
    )
    low = (tokens @ net.down.weight[:, :, 0, 0].T + net.down.bias).permute(0, 3, 1, 2)
    filters = [
        F.conv2d(low, f.weight, f.bias, padding="same", groups=low.shape[1]) for f in net.filters
    ]
    low = low + torch.stack(filters).mean(0)
    low = low + F.conv2d(low, net.mix.weight, net.mix.bias)
    return F.conv2d(F.gelu(low), net.up.weight, net.up.bias)


def test_houlsby_adapts_both_outputs_before_the_sum() -> None:
    model = HOSTS["timm-vit"].build().eval()
    block, x = model.blocks[1], torch.randn(2, 17, 32)
    live = wrap(model, Adapter(width=4))
    _randomised(live)
    with torch.no_grad():
        got = block(x)
        adapters = block.attn.proj.adapter.net, block.mlp.fc2.adapter.net
        live.undo()
        attn = block.attn(block.norm1(x))
        h = x + attn + _bottleneck(adapters[0], attn, F.gelu)
        mlp = block.mlp(block.norm2(h))
        want = h + mlp + _bottleneck(adapters[1], mlp, F.gelu)
    assert torch.allclose(got, want, atol=1e-5)


def test_adaptformer_reads_the_normalised_input() -> None:
    model = HOSTS["timm-vit"].build().eval()
    block, x = model.blocks[0], torch.randn(2, 17, 32)
    live = wrap(model, Adapter(variant="adaptformer", width=4, scale=0.5))
    _randomised(live)
    with torch.no_grad():
        got = block(x)
        net = block.mlp.fc2.adapter.net
        live.undo()
        h = x + block.attn(block.norm1(x))
        normed = block.norm2(h)
        want = h + block.mlp(normed) + 0.5 * _bottleneck(net, normed, F.relu)
    assert torch.allclose(got, want, atol=1e-5)
    assert Adapter(variant="adaptformer")._net(8, -1, {}).scale == 0.1


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_mona_filters_the_grid_and_leaves_prefix_tokens(size: tuple[int, int]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=(32, 32),
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        reg_tokens=4,
        dynamic_img_size=True,
    ).eval()
    images, seen = torch.randn(2, 3, *size), {}
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.update(before=o))
    live = wrap(model, Adapter(variant="mona", width=4))
    _randomised(live)
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.update(after=o))
    with torch.no_grad():
        model(images)
        before, after = seen["before"], seen["after"]
        net = model.blocks[0].adapter.net
        rows, columns = size[0] // 8, size[1] // 8
        grid = before[:, 5:].reshape(2, rows, columns, 16).permute(0, 3, 1, 2)
        want = before[:, 5:] + _mona(net, grid).flatten(2).transpose(1, 2)
    assert torch.equal(after[:, :5], before[:, :5])
    assert torch.allclose(after[:, 5:], want, atol=1e-4)
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "path", "axis"),
    [
        ("torchvision-swin", "features.1.0", -1),
        ("timm-convnext", "stages.0.blocks.0", 1),
        ("timm-resnet", "layer1.0", 1),
    ],
)
def test_conv_adapts_maps_of_either_order(name: str, path: str, axis: int) -> None:
    model = HOSTS[name].build().eval()
    block, seen = model.get_submodule(path), {}
    block.register_forward_hook(lambda m, i, o: seen.update(before=o))
    live = wrap(model, Adapter(variant="conv", width=4, input_shape=HOSTS[name].input_shape))
    _randomised(live)
    block.register_forward_hook(lambda m, i, o: seen.update(after=o))
    with torch.no_grad():
        model(HOSTS[name].batch()[0])
        net, x = block.adapter.net, seen["before"].movedim(axis, 1)
        low = F.conv2d(x, net.down.weight, net.down.bias)
        low = F.gelu(F.conv2d(low, net.depthwise.weight, net.depthwise.bias, padding=1, groups=4))
        want = (x + F.conv2d(low, net.up.weight, net.up.bias)).movedim(1, axis)
    assert torch.allclose(seen["after"], want, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_of_a_fresh_adapter_learns(variant: Any) -> None:
    """The trap: with both projections at zero only the last bias would ever move."""
    model = HOSTS["timm-vit"].build()
    images, labels = HOSTS["timm-vit"].batch()
    before = model.eval()(images)
    live = wrap(model, Adapter(variant=variant, width=4))
    assert torch.equal(model.eval()(images), before)
    moved = set()
    optimizer = torch.optim.SGD(live.param_groups(0.5))
    for _ in range(3):
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        moved |= {
            n for n, p in live.trainable.items() if p.grad is not None and p.grad.abs().max() > 0
        }
        optimizer.zero_grad()
    assert moved == set(live.trainable)
    assert {n.split(".")[0] for n in live.trainable} == {"blocks", "head"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_undo_is_exact_and_merge_is_refused(variant: Any) -> None:
    model = HOSTS["timm-deit3"].build()
    before = Snapshot(model)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_modules()]
    live = wrap(model, Adapter(variant=variant, width=4))
    with pytest.raises(GreenvisError, match="cannot be merged: an adapter is a non-linear network"):
        live.merge()
    assert len(list(model.state_dict())) > len(keys)
    live.undo()
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_map_is_adapted_that_nobody_reads() -> None:
    token, mean = (HOSTS["timm-vit"].build() for _ in range(2))
    mean.global_pool = "avg"
    for model, blocks in ((token, {"0", "1"}), (mean, {"0", "1", "2"})):
        nn.init.zeros_(model.head.weight)  # as fresh heads often are
        live = wrap(model, Adapter(variant="conv", width=4))
        assert {n.split(".")[1] for n in live.trainable if "adapter" in n} == blocks
        live.undo()
    with pytest.raises(BadInput, match="only the prefix token is read"):
        wrap(token, Adapter(variant="conv", width=4, blocks=1))


def test_last_blocks_only_stop_the_backward() -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, Adapter(width=4, blocks=1))
    assert {n.split(".")[1] for n in live.trainable if n.startswith("blocks")} == {"2"}
    seen = {}
    model.blocks[1].register_forward_hook(lambda m, i, o: seen.update(grad=o.requires_grad))
    model(HOSTS["timm-vit"].batch()[0])
    assert seen == {"grad": False}


def test_frozen_batch_norms_stay() -> None:
    model = HOSTS["timm-resnet"].build()
    wrap(model, Adapter(variant="conv", width=4, input_shape=(3, 64, 64)))
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deep_copy_has_adapters_of_its_own(variant: Any) -> None:
    model = HOSTS["timm-vit"].build().eval()
    live = wrap(model, Adapter(variant=variant, width=4))
    twin = copy.deepcopy(model)
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    _randomised(live)
    assert torch.equal(twin(x), before)
    assert not torch.allclose(model(x), before, atol=1e-3)


@pytest.mark.parametrize("order", [0, 1])
def test_goes_with_lora(order: int) -> None:
    from greenvis.techniques.iteration.peft.lora import Lora

    model = HOSTS["timm-vit"].build().eval()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    both = [Adapter(width=4), Lora(rank=2)]
    live = wrap(model, both[:: -1 if order else 1])
    assert torch.allclose(model(x), before, atol=1e-6)
    assert {n.rsplit(".", 3)[-2] for n in live.trainable} >= {"down", "up"}
    assert any("lora_A" in n for n in live.trainable)
    live.undo()
    assert torch.equal(model(x), before)


def test_a_block_that_is_a_sequential_is_not_given_a_child() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
                for _ in range(2)
            )
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for stage in self.stages:
                x = x + stage(x)
            return self.head(x.mean((2, 3)))

    model = Net().eval()
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    live = wrap(model, Adapter(variant="conv", width=4, input_shape=(3, 32, 32)))
    assert torch.equal(model(x), before)
    assert {n.split(".adapter")[0] for n in live.trainable if "adapter" in n} <= {
        "stages.0", "stages.1", "stages.0.2", "stages.1.2",
    }  # fmt: skip
    assert len(model.stages[0]) == 3


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        ("timm-resnet", {}, "houlsby adapters need attention or MLPs.*variant: conv"),
        ("plain", {"variant": "mona"}, "has no 'block'"),
        ("timm-vit", {"blocks": 4}, "blocks is 4, but VisionTransformer has 3"),
    ],
)
def test_refusals_change_nothing(name: str, request_: dict[str, Any], says: str) -> None:
    model = HOSTS[name].build()
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, Adapter(input_shape=HOSTS[name].input_shape, **request_))
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_nonsense() -> None:
    for wrong in (
        {"width": 0},
        {"variant": "adaptorformer"},
        {"scale": 0},
        {"kernel_size": 2},
        {"reduction": 4},
    ):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Adapter(**wrong)  # type: ignore[arg-type]
