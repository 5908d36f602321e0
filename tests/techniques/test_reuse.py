"""Masked pretraining from a base equals the authors' own on the fixture, on any base, and leaves a
plain model behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOSTS, unchanged
from torch import Tensor, nn

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import Samples
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.techniques._shared import tec as tec
from greenvis.techniques.annotation.masked.mae import Mae
from greenvis.techniques.iteration.reuse._bases import Base
from greenvis.techniques.iteration.reuse.reuse import Reuse

WHOLE = Path(__file__).parents[3] / "shared" / "fixtures" / "tec_tiny.pt"
IMAGE = (3, 32, 32)
close = partial(torch.allclose, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """The fixture without the weights of base and encoder."""
    one, other = (
        torch.load(Path(__file__).parents[1] / "fixtures" / f"tec_{n}.pt", weights_only=True)
        for n in ("encoder", "decoder")
    )
    return {**one, **other, "tec_state_dict": {**one["tec_state_dict"], **other["tec_state_dict"]}}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    if not WHOLE.exists():
        pytest.skip("the whole fixture is not beside the repository")
    return torch.load(WHOLE, weights_only=True)


def _vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 6,
        "num_heads": 3,
        "num_classes": 1000,
    }
    return VisionTransformer(**{**size, **more}).eval()


def _into(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state)
    module.eval()


def _adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {
        "adap_before": "before",
        "adap_after": "after",
        "fuse_fcs": "fuse",
        "adap_mlps": "mlps",
    }
    cut = {
        k.removeprefix("encoder_adaptor."): v
        for k, v in state.items()
        if k.startswith("encoder_adaptor.")
    }
    return {".".join(words.get(w, w) for w in k.split(".")): v for k, v in cut.items()}


def _entry(state: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    words = {
        "decoder_embed": "embed",
        "decoder_norm": "norm",
        "decoder_pred": "predict",
        "decoder_qk": "qk",
    }
    cut = {
        k.removeprefix(f"forward_{which}_decoder."): v
        for k, v in state.items()
        if k.startswith(f"forward_{which}_")
    }
    return {".".join(words.get(w, w) for w in k.split(".")): v for k, v in cut.items()}


def _decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    words = {"attn.qkv.weight": "self_attn.in_proj_weight",
    "attn.qkv.bias": "self_attn.in_proj_bias",
             "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1",
             "mlp.fc2": "linear2"}  # fmt: skip
    out = {}
    for name, value in state.items():
        if name.startswith("decoder_blocks."):
            for theirs, ours in words.items():
                name = name.replace(theirs, ours)
            out[name.removeprefix("decoder_")] = value
    return out


def test_masks_as_the_authors_do(parts: dict[str, Any]) -> None:
    keep, restore, mask = tec.random_mask(parts["mask_noise"], 4)
    assert torch.equal(restore, parts["ids_restore"])
    assert torch.equal(mask, parts["mask"])
    tokens = torch.arange(16.0).expand(3, -1)[..., None]
    back = tec.unshuffle(tec.visible(tokens, keep), torch.full((1, 1, 1), -1.0), restore)
    assert torch.equal(back[..., 0], torch.where(mask.bool(), -1.0, tokens[..., 0]))


def test_targets_and_losses_equal_the_fixture(parts: dict[str, Any]) -> None:
    target = tec.normalise_tokens(parts["target_feature"])
    assert close(target, parts["target_feature_normalised"])
    assert close(
        tec.feature_loss(parts["pred_feature"], target, parts["mask"]), parts["loss_feature"]
    )
    wrong = tec.feature_loss(
        parts["pred_feature"], tec.normalise_channels(parts["target_feature"]), parts["mask"]
    )
    assert abs(wrong.item() - parts["loss_feature_if_wrong_axis"]["mae_channel_norm"]) < 1e-4
    assert wrong - parts["loss_feature"] > 0.1
    for row in parts["loss_att_by_tau"]:
        found = tec.attention_loss(parts["pred_att"], parts["target_att_logits"], row["att_tau"])
        assert close(found, row["loss_att"])


def test_adapters_and_decoder_equal_the_fixture(parts: dict[str, Any]) -> None:
    state = parts["tec_state_dict"]
    token = tec.TokenMlp(48, 192)
    _into(
        token,
        {
            k.removeprefix("cls_token_mlp."): v
            for k, v in state.items()
            if k.startswith("cls_token_mlp.")
        },
    )
    assert close(
        token(state["cls_token"]).expand(3, -1, -1), parts["cls_tokens"]
    )  # their class token has position zero
    adapters = tec.EncoderAdapters(48, 6, 3, 128)
    _into(adapters, _adapters(state))
    assert close(adapters(parts["latents"]), parts["adapted"])
    decoder = tec.Decoder(32, 2, 4, (4, 4), prefix=1)
    assert close(decoder.positions, state["decoder_pos_embed"])
    _into(decoder, _decoder(state))
    feature, attention = tec.FeatureHead(48, 32, 48), tec.AttentionHead(48, 32, 48, 3)
    _into(feature, _entry(state, "fea"))
    _into(attention, _entry(state, "att"))
    adapted, restore = parts["adapted"], parts["ids_restore"]
    assert close(feature(decoder(adapted, feature, restore), 1), parts["pred_feature"])
    rows = attention(decoder(adapted, attention, restore), 1, parts["target_topk_idx"][:, 0])
    assert close(rows, parts["pred_att"][:, 0])


def test_a_whole_step_equals_the_fixture(
    whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    eps = partial(nn.LayerNorm, eps=1e-6)
    base, model = _vit(norm_layer=eps), _vit(norm_layer=eps)
    base.load_state_dict(whole["base_state_dict"])
    state = whole["tec_state_dict"]
    model.load_state_dict(
        {k: v for k, v in state.items() if k in whole["base_state_dict"]}, strict=False
    )
    shown = Base(base, IMAGE, (4, 4), 2, attention=True)(whole["images"])
    assert close(shown.features, whole["target_feature"])
    assert shown.logits is not None
    top = tec.top_patches(shown.logits, 5)
    assert torch.equal(top, whole["target_topk_idx"][:, 0])
    assert close(tec.attention_rows(shown.logits, top), whole["target_att_logits"][:, 0])

    live = wrap(model, Reuse(base=base, rows=5, decoder_dim=32))
    (its,) = live.installed
    added: Any = its
    added.parts.decoder = tec.Decoder(32, 2, 4, (4, 4), prefix=1)  # the fixture's has four heads
    _into(added.parts.decoder, _decoder(state))
    _into(added.parts.adapters, _adapters(state))
    _into(added.parts.heads[0]["feature"], _entry(state, "fea"))
    _into(added.parts.heads[0]["attention"], _entry(state, "att"))
    adapter = model.parametrizations.cls_token[0].adapter
    _into(
        adapter,
        {
            k.removeprefix("cls_token_mlp."): v
            for k, v in state.items()
            if k.startswith("cls_token_mlp.")
        },
    )
    keep, _, _ = tec.random_mask(whole["mask_noise"], 4)
    assert close(torch.cat(added.encoder(whole["images"], keep), -1), whole["latents"])
    monkeypatch.setattr(torch, "rand", lambda *a, **k: whole["mask_noise"])
    terms = live.terms(whole["images"], None, None)
    assert close(terms["reuse_feature"], whole["loss_feature"])
    assert close(terms["reuse_attention"], whole["loss_att"])


@pytest.mark.parametrize(
    "name",
    [
        "timm-vit",
        "torchvision-vit",
        "transformers-vit",
        "transformers-clip",
        "timm-dinov2-registers",
    ],
)
def test_attention_is_seen_in_every_library(name: str) -> None:
    """The logits' softmax times v is what the block's own attention gives: seen by disturbing
    nothing."""
    model = HOSTS[name].build().eval()
    x, _ = HOSTS[name].batch()
    base = Base(model, IMAGE, (4, 4), 1, attention=True)
    shown = base(x)
    assert shown.logits is not None
    heads = {"timm-vit": 4}.get(name, 2)
    assert shown.logits.shape == (4, heads, 17, 16)
    assert shown.features.shape == (4, 16, 32)
    again = base(x.roll(1, 0))
    assert again.logits is not None
    assert torch.allclose(again.logits, shown.logits.roll(1, 0), atol=1e-5)


def test_attention_of_torchvision_equals_its_own_weights() -> None:
    model: Any = HOSTS["torchvision-vit"].build().eval()
    x, _ = HOSTS["torchvision-vit"].batch()
    shown = Base(model, IMAGE, (4, 4), 1, attention=True)(x)
    seen: dict[str, Tensor] = {}
    attention = model.encoder.layers[-1].self_attention
    hook = attention.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(x)
    hook.remove()
    _, weights = attention(
        seen["x"], seen["x"], seen["x"], need_weights=True, average_attn_weights=False
    )
    assert shown.logits is not None
    mine = shown.logits.softmax(-1)
    theirs = weights[:, :, :, 1:] / weights[:, :, :, 1:].sum(-1, keepdim=True)
    assert torch.allclose(mine, theirs, atol=1e-5)


BASES: dict[str, Any] = {
    "wider, deeper, other patches": lambda: _vit(embed_dim=96, depth=8, patch_size=4),
    "other size": lambda: _vit(img_size=64, patch_size=16),
    "grey": lambda: _vit(in_chans=1),
    "registers": lambda: _vit(reg_tokens=4),
    "no class token": lambda: _vit(class_token=False, global_pool="avg"),
    "torchvision": lambda: HOSTS["torchvision-vit"].build(),
    "transformers": lambda: HOSTS["transformers-dinov2"].build(),
    "rope": lambda: HOSTS["timm-eva02"].build(),
}
FEATURES: dict[str, Any] = {
    "resnet": lambda: HOSTS["timm-resnet"].build(),
    "convnext": lambda: HOSTS["transformers-convnext"].build(),
    "swin": lambda: HOSTS["timm-swin"].build(),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [*BASES, *FEATURES])
def test_learns_from_any_base(name: str) -> None:
    base = {**BASES, **FEATURES}[name]()
    before = Snapshot(base)
    flags = [
        (p.requires_grad, m.training) for m in base.modules() for p in m.parameters(recurse=False)
    ]
    model = _vit(depth=2)
    targets = ("feature",) if name in FEATURES else ("feature", "attention")
    live = wrap(model, Reuse(base=base, targets=targets))
    terms = live.terms(torch.rand(2, *IMAGE), None, None)
    assert set(terms) == {f"reuse_{t}" for t in targets}
    torch.stack(list(terms.values())).sum().backward()
    assert all(
        p.grad is not None for n, p in live.trainable.items() if "reuse" in n or "adapter" in n
    )
    assert model.patch_embed.proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in base.parameters())
    live.undo()
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert [
        (p.requires_grad, m.training) for m in base.modules() for p in m.parameters(recurse=False)
    ] == flags


def test_the_class_token_s_row_alone_is_a_target(tmp_path: Path) -> None:
    base, x, losses = _vit(depth=2), torch.rand(8, *IMAGE), []
    shown = Base(base, IMAGE, (4, 4), 2, attention=True)(x)
    assert shown.logits is not None
    live = wrap(_vit(depth=2), Reuse(base=base, rows=0, targets=("attention",), cache="fp32"))
    for samples, _ in zip(_samples(tmp_path), range(2), strict=False):
        live.set_samples(samples)
        torch.manual_seed(0)
        losses.append(live.loss(x, None, None))
    assert torch.equal(*losses)
    added: Any = live.installed[0]
    targets = added.asked[0](x)
    assert targets["top"].shape == (8, 0)
    assert close(targets["attention"][:, 0], shown.logits[:, :, 0])


def test_a_convolutional_base_sees_the_images_in_a_size_of_its_own() -> None:
    base = FEATURES["resnet"]()
    live = wrap(_vit(depth=2), Reuse(base=base, targets=("feature",), base_size=64))
    added: Any = live.installed[0]
    seen: list[Tensor] = []
    base.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = added.asked[0](torch.rand(2, *IMAGE))["feature"]
    assert seen[0].shape == (2, 3, 64, 64)
    assert features.shape[1] == 16
    assert (features.std(1) > 0).float().mean() > 0.5  # of one place there would be none


def test_several_bases_at_once() -> None:
    model = _vit(depth=2)
    live = wrap(
        model, Reuse(base=[_vit(depth=2), HOSTS["timm-resnet"].build()], targets=("feature",))
    )
    added: Any = live.installed[0]
    assert [h["feature"].predict.out_features for h in added.parts.heads] == [48, 32]
    assert live.loss(torch.rand(2, *IMAGE), None, None).isfinite()


def test_a_plain_model_comes_out_with_the_token_folded() -> None:
    model, keys = _vit(depth=2, num_classes=5), list(_vit(depth=2, num_classes=5).state_dict())
    token = model.cls_token
    live = wrap(model, Reuse(base=_vit(depth=2)))
    optimizer = torch.optim.AdamW(live.param_groups(1e-2))
    live.loss(torch.rand(2, *IMAGE), None, None).backward()
    optimizer.step()
    x = torch.rand(2, *IMAGE)
    adapter = model.parametrizations.cls_token[0].adapter
    wanted, folded = model.eval()(x), adapter(token).detach().clone()
    merged = live.merge()
    assert type(merged) is type(_vit())
    assert list(merged.state_dict()) == keys
    assert torch.equal(token, folded)
    assert merged.cls_token is token
    assert torch.allclose(merged(x), wanted, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    _vit(depth=2, num_classes=5).load_state_dict(merged.state_dict())


def _samples(folder: Path, views: int = 1) -> Iterator[Samples]:
    while True:
        yield Samples(folder, {"images": "random"}, 8, views, torch.arange(8))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_kept_targets_teach_the_same(tmp_path: Path, precision: Any) -> None:
    x = torch.rand(8, *IMAGE)
    ends, asked = {}, {}
    for cache in (precision, "off"):
        torch.manual_seed(0)
        model, base = _vit(depth=2), _vit(depth=2)
        asked[cache] = 0

        def count(module: nn.Module, args: Any, output: Any, cache: str = cache) -> None:
            asked[cache] += 1

        live = wrap(model, Reuse(base=base, cache=cache))
        base.register_forward_hook(count)
        optimizer = torch.optim.AdamW(live.param_groups(1e-3))
        for samples, _ in zip(_samples(tmp_path), range(3), strict=False):
            live.set_samples(samples)
            live.loss(x, None, None).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[cache] = torch.cat([p.detach().flatten() for p in live.trainable.values()])
        if cache != "off":
            (facts,) = live.facts()["reuse_targets"]
            assert (facts["hits"], facts["misses"]) == (16, 8)
        live.undo()
    assert asked == {precision: 1, "off": 3}
    if precision == "fp32":
        assert torch.equal(ends["fp32"], ends["off"])
    else:
        assert torch.allclose(ends["fp16"], ends["off"], atol=5e-3)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"base": "file:/nowhere/base.safetensors"}, "no weights at"),
        ({"base": "run:base"}, "only a recipe can resolve it"),
        ({"base": []}, "needs a base"),
        ({"base": 3}, "not int"),
        ({"base": HOSTS["timm-resnet"].build}, "has no attention to learn from; set targets"),
        ({"base": _vit, "rows": 17}, "rows is 17, but VisionTransformer has 16 patches"),
        ({"base": _vit, "mask_ratio": 0.99}, "leaves none hidden or none visible"),
    ],
)
def test_refuses_before_anything_changes(request_: dict[str, Any], says: str) -> None:
    model = _vit(depth=2)
    base = request_["base"]
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, Reuse(**{**request_, "base": base() if callable(base) else base}))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refuses_itself_as_base_and_a_token_that_is_not_there() -> None:
    model = _vit(depth=2)
    with pytest.raises(BadInput, match="shares"):
        wrap(model, Reuse(base=model))
    bare = _vit(depth=2, class_token=False, global_pool="avg")
    with pytest.raises(BadInput, match="shows no class token"):
        wrap(bare, Reuse(base=copy.deepcopy(model), input_adapter=True))
    live = wrap(bare, Reuse(base=model))
    assert live.loss(torch.rand(2, *IMAGE), None, None).isfinite()


def _flops(live: Any, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        live.loss(x, None, None).backward()
    return counter.get_total_flops()


def test_a_later_epoch_costs_less_than_one_of_a_masked_autoencoder(tmp_path: Path) -> None:
    """Both as published: TEC's decoder has two blocks and runs twice, MAE's has eight. The paper's
    TEC pays about 1.4 times."""
    x, size = torch.rand(8, *IMAGE), {"patch_size": 4, "embed_dim": 96}
    costs = {}
    for cache in ("fp16", "off"):
        model: Any = _vit(**size)
        live = wrap(model, Reuse(base=_vit(**size), cache=cache))
        for samples, epoch in zip(_samples(tmp_path), (1, 2), strict=False):
            live.set_samples(samples)
            costs[cache, epoch] = _flops(live, x)
        live.undo()
    rival = _flops(wrap(_vit(**size), Mae()), x)
    assert costs["fp16", 2] < costs["fp16", 1] == costs["off", 1] == costs["off", 2]
    assert costs["fp16", 2] < 0.9 * rival
    assert costs["off", 2] > rival
