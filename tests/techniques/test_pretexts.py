"""Cheap pretexts (turns, contrasts, a base's features): losses as the papers write them, and a
plain model afterwards."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged, vit
from torch import Tensor, nn

from greenvis.core.technique import Samples
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.techniques._shared.views import random_view
from greenvis.techniques.annotation.contrastive.rotation import Rotation, turned
from greenvis.techniques.annotation.contrastive.simclr import Simclr, nt_xent
from greenvis.techniques.iteration.peft.lora import Lora
from greenvis.techniques.iteration.reuse.feature_distill import FeatureDistill, whitened_loss

# -- contrasts ------------------------------------------------------------------------------------


def test_nt_xent_is_equation_1() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 7)
    z, temperature = torch.cat([first, second]), 0.3
    total = 0.0
    for i in range(10):
        s = [float(F.cosine_similarity(z[i], z[k], dim=0)) / temperature for k in range(10)]
        total -= s[(i + 5) % 10] - math.log(sum(math.exp(s[k]) for k in range(10) if k != i))
    assert nt_xent(first, second, temperature).item() == pytest.approx(total / 10, abs=1e-5)
    assert nt_xent(3 * first, second, temperature).item() == pytest.approx(total / 10, abs=1e-5)


def test_a_view_of_the_whole_image_in_its_colours_is_the_image() -> None:
    x = torch.rand(3, 2, 8, 12)
    assert torch.allclose(random_view(x, area=1.0, colour=0.0, flip=False), x, atol=1e-5)


def test_views_are_drawn_image_by_image_from_the_seed() -> None:
    x = torch.rand(1, 3, 16, 16).repeat(6, 1, 1, 1)
    torch.manual_seed(1)
    one, two = random_view(x, 0.25, 0.4), random_view(x, 0.25, 0.4)
    torch.manual_seed(1)
    assert torch.equal(random_view(x, 0.25, 0.4), one)
    assert not torch.equal(one, two)
    assert all(not torch.allclose(one[0], other) for other in one[1:])
    assert one.shape == x.shape
    assert one.isfinite().all()


def test_flips_and_colours_are_as_said() -> None:
    x = torch.rand(64, 1, 8, 8)
    seen = random_view(x, 1.0, 0.0, flip=True)
    flipped = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(seen, x, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(seen, x, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48
    bright = random_view(x, 1.0, 0.4, flip=False)
    contrast = bright.std((1, 2, 3)) / x.std((1, 2, 3))
    shift = (bright.mean((1, 2, 3)) - x.mean((1, 2, 3))) / x.std((1, 2, 3))
    assert contrast.min() > 0.6 - 1e-3
    assert contrast.max() < 1.4 + 1e-3
    assert 0.2 < shift.abs().max() < 0.4 + 1e-3


# -- turns ----------------------------------------------------------------------------------------


def test_each_image_is_turned_by_its_own_number_of_quarters() -> None:
    x = torch.rand(5, 3, 8, 8)
    quarters = torch.tensor([0, 1, 2, 3, 1])
    for image, number, seen in zip(x, quarters, turned(x, quarters), strict=True):
        assert torch.equal(seen, torch.rot90(image, int(number), (1, 2)))


def test_all_turns_are_judged_together() -> None:
    model: Any = vit()
    live = wrap(model, Rotation(turns="all"))
    head: Any = model.head.rotation
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        found = live.terms(x, None, None)["rotation"]
        predicted = [
            head(model.forward_head(model.forward_features(x.rot90(q, (2, 3))), pre_logits=True))
            for q in range(4)
        ]
    expected = torch.stack(
        [F.cross_entropy(t, torch.full((3,), q)) for q, t in enumerate(predicted)]
    ).mean()
    assert torch.allclose(found, expected, atol=1e-6)


# -- a base's features ----------------------------------------------------------------------------


def test_learns_the_base_s_whitened_features() -> None:
    torch.manual_seed(0)
    model, base = vit(), vit(embed_dim=40, num_heads=4)
    live = wrap(model, FeatureDistill(base=base, beta=0.7))
    projection: Any = model.blocks[-1].feature_distill
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = live.terms(x, None, None)["feature_distill"]
        tokens = base.forward_intermediates(
            x, indices=1, output_fmt="NLC", intermediates_only=True
        )[0]
        own = projection(
            model.forward_intermediates(x, indices=1, output_fmt="NLC", intermediates_only=True)[0]
        )
    target = nn.LayerNorm(40, elementwise_affine=False)(
        tokens
    )  # the authors' whitening: of the biased variance
    error = (own - target).abs()
    expected = torch.where(error < 0.7, error**2 / 1.4, error - 0.35).mean()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(found, whitened_loss(own, target, 0.7), atol=1e-6)


@pytest.mark.parametrize("base", ["timm-resnet", "timm-swin", "transformers-vit"])
def test_takes_a_base_of_another_kind_and_never_changes_it(base: str) -> None:
    model, old = vit(), HOSTS[base].build()
    before = {n: t.clone() for n, t in old.state_dict().items()}
    modes = [m.training for m in old.modules()]
    live = wrap(model, FeatureDistill(base=old))
    optimizer = torch.optim.AdamW(live.param_groups(3e-3))
    x = torch.rand(4, 3, 32, 32)
    losses = []
    for _ in range(10):
        loss = live.loss(x, None, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(t, before[n]) for n, t in old.state_dict().items())
    assert all(p.grad is None for p in old.parameters())
    live.undo()
    assert [m.training for m in old.modules()] == modes


def test_kept_features_cost_no_forward_of_the_base(tmp_path: Path) -> None:
    model, base = vit(), vit()
    asked: list[int] = []
    base.blocks[-1].register_forward_hook(lambda module, args, output: asked.append(len(output)))
    live = wrap(model, FeatureDistill(base=base, cache="fp32"))
    asked.clear()
    x, losses = torch.rand(8, 3, 32, 32), []
    for _ in range(3):
        live.set_samples(Samples(tmp_path, {"images": "random"}, 8, 1, torch.arange(8)))
        with torch.no_grad():
            losses.append(live.loss(x, None, None).item())
    assert asked == [8]
    assert losses[0] == losses[1] == losses[2]
    assert live.facts()["feature_distill_targets"][0]["hits"] == 16


# -- all of them ----------------------------------------------------------------------------------


def _request(kind: type[Any]) -> Any:
    return kind(base=vit()) if kind is FeatureDistill else kind()


@pytest.mark.parametrize("kind", [Simclr, Rotation, FeatureDistill])
def test_learns_and_leaves_a_plain_model(kind: type[Any]) -> None:
    torch.manual_seed(0)
    model = vit()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    live = wrap(model, _request(kind))
    optimizer = torch.optim.AdamW(live.param_groups(3e-3))
    x = F.interpolate(torch.randn(6, 3, 2, 2), (32, 32), mode="bilinear")
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        loss: Tensor = live.loss(x, None, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert list(live.merge().state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert "blocks.0.attn.qkv.weight" in changed
    assert not [n for n in changed if n.startswith("head.")]
    live.undo()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("kind", [Simclr, Rotation, FeatureDistill])
def test_refuses_what_learns_from_answers(kind: type[Any]) -> None:
    model = vit()
    with (
        unchanged(model),
        pytest.raises(
            BadInput,
            match=f"'{kind.name}' and 'lora' do not go together: '{kind.name}' is a pretext",
        ),
    ):
        wrap(model, [Lora(rank=2), _request(kind)])


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(BadInput, match="needs square ones"):
        wrap(vit(img_size=(32, 16)), Rotation())
    with pytest.raises(BadInput, match="shows no classifier"):
        wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Simclr())
    shared = vit()
    with pytest.raises(BadInput, match="shares 'cls_token' with the model"):
        wrap(shared, FeatureDistill(base=shared))
    with pytest.raises(BadInput, match="only a recipe can resolve it"):
        wrap(vit(), FeatureDistill(base="run:base"))
    for kind, wrong in (
        (Simclr, {"temperature": 0}),
        (Simclr, {"area": 0}),
        (Rotation, {"turns": "some"}),
    ):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            kind(**wrong)
