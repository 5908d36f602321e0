"""Masked autoencoding: patches, targets and loss as the papers write them, and a plain model
afterwards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged, vit
from scipy import ndimage
from torch import Tensor

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.techniques._shared import tec as tec
from greenvis.techniques.annotation.masked.mae import Mae, hog, patchify
from greenvis.techniques.inference.distill.distill import Distill
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.layer_decay import LayerDecay
from greenvis.techniques.iteration.peft.lora import Lora


def test_patches_are_those_that_the_model_embeds() -> None:
    x = torch.rand(2, 3, 16, 24)
    patches = patchify(x, (2, 3))
    assert patches.shape == (2, 6, 192)
    unfolded = (
        F.unfold(x, 8, stride=8).transpose(1, 2).unflatten(-1, (3, 64)).transpose(2, 3).flatten(2)
    )
    assert torch.equal(patches, unfolded)
    model = vit()
    weight = model.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(
        patchify(images, (4, 4)) @ weight.T + model.patch_embed.proj.bias,
        model.patch_embed(images),
        atol=1e-5,
    )


def test_normalised_pixels_are_the_paper_s() -> None:
    x = torch.rand(2, 3, 32, 32)
    target = Mae().targets(x, (4, 4))
    patch = x[1, :, 8:16, 16:24].permute(1, 2, 0).flatten()
    assert torch.allclose(target[1, 6], (patch - patch.mean()) / patch.std(), atol=1e-4)
    assert torch.equal(Mae(normalise=False).targets(x, (4, 4))[1, 6], patch)


@pytest.mark.parametrize(("angle", "bin_"), [(0, 4), (80, 0), (45, 2)])
def test_histograms_point_where_the_gradient_points(angle: int, bin_: int) -> None:
    """Bins run over the direction of (across, down), folded to half a turn: 20 degrees each, from
    straight down."""
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    turned = math.radians(angle + 1)
    x = (math.cos(turned) * column + math.sin(turned) * row).expand(1, 1, 16, 16)
    features = hog(x, (2, 2))
    assert features.shape == (1, 4, 36)
    assert torch.allclose(
        features.unflatten(-1, (4, 9)).norm(dim=-1), torch.ones(1, 4, 4)
    )  # by cell
    inner = features.unflatten(-1, (4, 9))[
        0, 0, 3
    ]  # the cell of patch 0 that no edge of the image touches
    assert inner.argmax() == bin_
    assert (inner > 0).sum() == 1


@pytest.mark.parametrize(("side", "grid", "cell"), [(16, 2, 4), (12, 3, 4), (20, 2, 5)])
def test_histograms_are_maskfeat_s(side: int, grid: int, cell: int) -> None:
    """Sobel's gradients at mirrored edges, votes by size, each cell of each channel of length 1:
    pixel by pixel."""
    x = torch.rand(
        1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    patch = side // grid
    cells = patch // cell
    expected = np.zeros((grid, grid, 3, cells, cells, 9))
    for channel in range(3):
        pixels = x[0, channel].numpy()
        across, down = (ndimage.sobel(pixels, axis, mode="mirror") for axis in (1, 0))
        for row in range(side):
            for column in range(side):
                a, d = across[row, column], down[row, column]
                bin_ = math.floor(math.atan2(a, d) / math.pi * 9) % 9
                at = (
                    row // patch,
                    column // patch,
                    channel,
                    row % patch // cell,
                    column % patch // cell,
                    bin_,
                )
                expected[at] += math.hypot(a, d)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    assert np.allclose(
        hog(x, (grid, grid))[0].numpy(), expected.reshape(grid * grid, -1), atol=1e-6
    )


def test_the_loss_counts_masked_patches_only() -> None:
    model: Any = vit()
    live = wrap(model, Mae(decoder_depth=1))
    x = torch.rand(2, 3, 32, 32)
    torch.manual_seed(3)
    found = live.terms(x, None, None)["mae"]
    torch.manual_seed(3)
    keep, restore, mask = tec.random_mask(torch.rand(2, 16), 4)
    tokens = model.patch_embed(x) + model.pos_embed[:, 1:]
    shown = torch.stack([t[k] for t, k in zip(tokens, keep, strict=True)])
    encoded: Tensor = torch.cat(
        [(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), shown], 1
    )
    added: Any = live.installed[0]
    encoded = model.norm(model.blocks(encoded))
    predicted = added.parts.head(added.parts.decoder(encoded, added.parts.head, restore), 1)
    error = ((predicted - Mae().targets(x, (4, 4))) ** 2).mean(-1)
    assert torch.allclose(found, error[mask.bool()].mean(), atol=1e-6)
    assert mask.sum() == 24


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize("name", ["timm-deit-distilled", "torchvision-vit", "transformers-vit"])
def test_learns_and_leaves_a_plain_model(name: str, target: Any) -> None:
    model = HOSTS[name].build()
    keys = list(model.state_dict())
    x, _ = HOSTS[name].batch()
    live = wrap(model, Mae(decoder_depth=1, target=target))
    optimizer = torch.optim.AdamW(live.param_groups(3e-3))
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = live.loss(x, None, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert list(live.merge().state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("timm-resnet", "ResNet has no attention"),
        ("timm-swin", "attends in windows"),
        ("timm-eva02", "RoPE"),
        ("plain", "does not show its attention as a row of blocks"),
    ],
)
def test_refuses_what_needs_all_its_patches(host: str, says: str) -> None:
    model = HOSTS[host].build()
    with pytest.raises(BadInput, match=says):
        wrap(model, Mae(input_shape=HOSTS[host].input_shape))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refuses_nonsense() -> None:
    with pytest.raises(BadInput, match="leaves none hidden or none visible"):
        wrap(vit(), Mae(mask_ratio=0.99))
    for wrong in ({"mask_ratio": 1}, {"target": "hogs"}, {"decoder_dim": 6}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Mae(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [Distill(teacher=vit()), Lora(rank=2), Adapter(width=4)])
def test_refuses_what_learns_from_answers(other: Any) -> None:
    model = vit()
    with (
        unchanged(model),
        pytest.raises(
            BadInput, match=f"'mae' and '{other.name}' do not go together: 'mae' is a pretext"
        ),
    ):
        wrap(model, [other, Mae(decoder_depth=1)])


def test_goes_with_rates_by_layer() -> None:
    live = wrap(vit(), [LayerDecay(), Mae(decoder_depth=1)])
    assert {g["lr"] for g in live.param_groups(1.0)} == {0.65**i for i in range(4)}
    assert live.loss(torch.rand(2, 3, 32, 32), None, None).isfinite()


def test_begins_with_fixed_positions_and_the_paper_s_weights() -> None:
    model = vit()
    head, before = model.head.weight.detach().clone(), Snapshot(model)
    live = wrap(model, Mae(decoder_depth=1, init="mae"))
    assert torch.equal(model.pos_embed, tec.sincos_2d(24, 4, 4, 1))
    assert not model.pos_embed.requires_grad
    qkv = model.blocks[0].attn.qkv
    bound = math.sqrt(6 / (24 + 72))
    assert 0.9 * bound < qkv.weight.abs().max() <= bound
    assert qkv.bias.abs().max() == 0
    patch = model.patch_embed.proj.weight
    assert patch.abs().max() <= math.sqrt(6 / (3 * 64 + 24))
    assert torch.equal(model.head.weight, head)
    optimizer = torch.optim.AdamW(live.param_groups(1e-2))
    live.loss(torch.rand(2, 3, 32, 32), None, None).backward()
    optimizer.step()
    assert torch.equal(live.merge().pos_embed, tec.sincos_2d(24, 4, 4, 1))
    assert model.pos_embed.requires_grad
    live.undo()
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    with pytest.raises(BadInput, match="shows 0 position embeddings of its 16 patches"):
        wrap(vit(pos_embed="none"), Mae(decoder_depth=1, init="mae"))
