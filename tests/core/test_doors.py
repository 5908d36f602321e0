"""Doors into a model other than its forward: a map lies where its patches do, or is refused; the
answers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import greenvis as gv


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 4,
    }
    return timm.create_model("vit_tiny_patch16_224", **sizes | more).eval()


def transformer(kind: Any = ViTForImageClassification, **more: Any) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        **more,
    )
    return kind(config).eval()


pytestmark = pytest.mark.one_in(3)

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MERGING: dict[str, gv.Technique] = {
    "merge": gv.TokenMerge(r=8),
    "merge to a square": gv.TokenMerge(
        r=[28, 12, 0, 0]
    ),  # 36 and 24 of 64 patches: 36 fill a map of 6 × 6
    "merge late": gv.TokenMerge(r=[0, 0, 9, 9], proportional=False),
    "merge, never restored": gv.TokenMerge(r=8, restore="never"),
    "merge, always restored": gv.TokenMerge(r=8, restore="always"),
}
PRUNING: dict[str, gv.Technique] = {
    "prune": gv.TokenPrune(keep=0.6),
    "prune by attention": gv.TokenPrune(method="class_attention", keep=0.6),
    "prune and fuse": gv.TokenPrune(
        method="class_attention", keep=0.5, fuse=True, blocks=[0, 1, 2]
    ),
}
JOINING: dict[str, gv.Technique] = {
    "prompt": gv.Prompt(tokens=15),
    "prompt to a square": gv.Prompt(tokens=36),
    "deep prompt": gv.Prompt(tokens=5, depth="deep"),
    "pool": gv.PromptPool(pool=4, length=2, top_n=2, query="patch", readout="class"),
}
ALL = {**MERGING, **PRUNING, **JOINING}


def maps(model: Any, **how: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(model.forward_intermediates(X, intermediates_only=True, **how))


@pytest.mark.parametrize("name", ALL)
def test_maps_have_a_cell_for_each_patch(name: str) -> None:
    live = gv.wrap(vit(), [ALL[name]])
    assert [tuple(m.shape) for m in maps(live.model)] == [(2, 32, 8, 8)] * 4
    layers = live.model.get_intermediate_layers(
        X, n=[1, 3], reshape=True, return_prefix_tokens=True, norm=True
    )
    assert [(tuple(m.shape), tuple(p.shape)) for m, p in layers] == [
        ((2, 32, 8, 8), (2, 1, 32))
    ] * 2


@pytest.mark.parametrize("name", ALL)
def test_the_other_doors_leave_no_mark_on_the_answers(name: str) -> None:
    model = gv.wrap(vit(), [ALL[name]]).model
    with torch.no_grad():
        answers = model(X)
        maps(model)
        features = model.forward_features(X)
        torch.testing.assert_close(model.forward_head(features), answers, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(X), answers, rtol=0, atol=0)
    if "never" not in name:
        assert features.shape == (2, 65, 32)


@pytest.mark.parametrize("name", {**MERGING, **PRUNING})
def test_a_change_of_the_last_patch_shows_in_the_last_cell(name: str) -> None:
    technique = ALL[name]
    other = X.clone()
    other[:, :, -4:, -4:] += 5
    model = vit(global_pool="token")
    model = gv.wrap(model, [technique]).model
    with torch.no_grad():
        before, after = (
            model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
            for x in (X, other)
        )
    change = (before - after).abs().mean((0, 1)).flatten()
    assert change[-1] == change.max() > 10 * change[:-1].median()


@pytest.mark.parametrize("name", {**MERGING, **PRUNING})
def test_the_class_token_on_the_way_is_the_one_the_head_gets(name: str) -> None:
    """The row shown is a view of the very tokens that go on: with a linear head, logits follow from
    the last class token."""
    model = gv.wrap(vit(), [ALL[name]]).model
    with torch.no_grad():
        (_, prefix), *_ = model.forward_intermediates(
            X, indices=[3], return_prefix_tokens=True, intermediates_only=True
        )
        torch.testing.assert_close(
            model.head(model.norm(prefix[:, 0])), model(X), rtol=1e-4, atol=1e-5
        )


def test_merged_patches_share_a_value_and_the_rest_keep_theirs() -> None:
    live = gv.wrap(vit(), [gv.TokenMerge(r=8)])
    shown = maps(live.model, output_fmt="NLC")
    live.model(X)
    for number, row in enumerate(shown):
        lies_in = live.installed[0].token_map(number + 1)[:, 1:]  # type: ignore[attr-defined]
        for sample, tokens in enumerate(row):
            same = (tokens[:, None] == tokens[None]).all(-1)
            assert torch.equal(same, lies_in[sample][:, None] == lies_in[sample][None])


@pytest.mark.parametrize("name", ALL)
def test_a_neutral_change_shows_the_plain_maps(name: str) -> None:
    technique = ALL[name]
    if technique.neutral is None:
        pytest.skip("prompts change what the model computes")
    neutral = type(technique)(**technique.neutral)
    for one, other in zip(maps(gv.wrap(vit(), [neutral]).model), maps(vit()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_of_transformers(name: str) -> None:
    live = gv.wrap(transformer(), [ALL[name]])
    with torch.no_grad():
        plain = live.model(X).logits
        output = live.model(X, output_hidden_states=True)
        torch.testing.assert_close(output.logits, plain, rtol=1e-4, atol=1e-5)
        assert [tuple(h.shape) for h in output.hidden_states] == [(2, 65, 32)] * 5
        torch.testing.assert_close(live.model(X).logits, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(gv.GreenvisError, match="attention maps"):
        live.model(X, output_attentions=True)


def test_hidden_states_set_in_the_configuration() -> None:
    live = gv.wrap(transformer(output_hidden_states=True), [gv.TokenMerge(r=8)])
    assert [tuple(h.shape) for h in live.model(X).hidden_states] == [(2, 65, 32)] * 5


@pytest.mark.parametrize("name", MERGING)
def test_a_backbone_of_transformers_gives_whole_maps(name: str) -> None:
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=32,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[2, 4],
    )
    model = gv.wrap(Dinov2Backbone(config).eval(), [ALL[name]]).model
    assert [tuple(m.shape) for m in model(X).feature_maps] == [(2, 32, 8, 8)] * 2


def test_a_transformer_without_a_head_gives_all_its_tokens() -> None:
    with torch.no_grad():
        assert gv.wrap(transformer(ViTModel), [gv.TokenMerge(r=8)]).model(
            X
        ).last_hidden_state.shape == (2, 65, 32)
        left = (
            gv.wrap(transformer(ViTModel), [gv.TokenMerge(r=8, restore="never")])
            .model(X)
            .last_hidden_state
        )
    assert left.shape == (2, 33, 32)


@pytest.mark.parametrize("name", ALL)
def test_a_hook_on_a_block_sees_every_patch(name: str) -> None:
    model = gv.wrap(vit(), [ALL[name]]).model
    with torch.no_grad():
        before = model(X)
    seen: list[tuple[int, ...]] = []
    hook = model.blocks[2].register_forward_hook(
        lambda module, args, output: seen.append(tuple(output.shape))
    )
    with torch.no_grad():
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    hook.remove()
    assert seen == [(2, 65, 32)]


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_gives_features_only(name: str) -> None:
    model = FeatureGetterNet(vit(), out_indices=[1, 2, 3])
    try:
        live = gv.wrap(model, [ALL[name]])
    except gv.BadInput:
        assert name in PRUNING, "what is asked for are the patches"
        return
    assert [tuple(m.shape) for m in live.model(X)] == [(2, 32, 8, 8)] * 3
    live.undo()
    for one, other in zip(model(X), FeatureGetterNet(vit(), out_indices=[1, 2, 3])(X), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_gradients_come_through_the_other_doors(name: str) -> None:
    technique = ALL[name]
    model = gv.wrap(vit(), [technique]).model
    model.eval()
    model.forward_head(model.forward_features(X)).square().sum().backward()
    by_door = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(X).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                by_door[parameter_name], parameter.grad, rtol=1e-3, atol=1e-5
            )


def test_a_pool_that_asks_the_whole_model_is_refused_past_it() -> None:
    model = gv.wrap(vit(), [gv.PromptPool(pool=4, length=2, top_n=2)]).model
    before = model(X)
    with pytest.raises(gv.GreenvisError, match="call the model itself"):
        maps(model)
    with pytest.raises(gv.GreenvisError, match="call the model itself"):
        model.forward_features(X)
    assert torch.equal(model(X), before)


OTHERS: dict[str, Callable[[], gv.Technique]] = {
    "lora": lambda: gv.Lora(rank=2),
    "side": lambda: gv.Side(),
    "early_exit": lambda: gv.EarlyExit(at=(1, 2), threshold=0.26),
    "adapter": lambda: gv.Adapter(width=4, variant="conv"),
    "linear_probe": lambda: gv.LinearProbe(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_techniques_that_keep_the_tokens_change_no_map_while_fresh(name: str) -> None:
    model = gv.wrap(vit(), [OTHERS[name]()]).model
    for one, other in zip(maps(model), maps(vit()), strict=True):
        torch.testing.assert_close(one, other)


def test_an_adapter_of_maps_sees_the_size_of_the_images_by_every_door() -> None:
    model = gv.wrap(vit(dynamic_img_size=True), [gv.Adapter(width=4, variant="conv")]).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        wide = torch.rand(2, 3, 16, 64)
        features = model.forward_features(
            wide
        )  # before any forward of the whole model on such images
        torch.testing.assert_close(model.forward_head(features), model(wide))


@pytest.mark.parametrize("name", [*ALL, "early_exit"])
def test_a_traced_feature_extractor_is_right_or_refused(name: str) -> None:
    import torchvision

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(32, 4, 4, 2, 32, 64, num_classes=4).eval()
        nn.init.normal_(model.heads.head.weight)
        return model

    technique = {**ALL, "early_exit": OTHERS["early_exit"]()}[name]
    try:
        model = gv.wrap(build(), [technique]).model
    except gv.BadInput:
        return
    layer = "encoder.layers.encoder_layer_1"
    try:
        extractor = create_feature_extractor(
            model, {f"{layer}.mlp": "mlp", layer: "block", "heads": "logits"}
        )
    except gv.GreenvisError:
        return
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.no_grad():
        output = extractor(X)
        torch.testing.assert_close(output["logits"], model(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output["block"], seen[-1], rtol=1e-4, atol=1e-5)
