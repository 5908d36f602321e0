"""Each layer learns at the rate BEiT and MAE give it; the others' parameters keep theirs."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import HOSTS
from torch import nn

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.experiment.optim import make_optimizer
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.layer_decay import LayerDecay


def _rates(live: Wrapped, lr: float = 1.0) -> dict[str, float]:
    names = {id(p): n for n, p in live.model.named_parameters()}
    return {
        names[id(p)]: g["lr"]
        for g in make_optimizer(live, TrainSpec(lr=lr)).param_groups
        for p in g["params"]
    }


@pytest.mark.parametrize("name", ["timm-vit", "timm-deit3"])
def test_numbers_are_timm_s_own(name: str) -> None:
    from timm.optim._param_groups import param_groups_layer_decay

    model = HOSTS[name].build()
    expected: dict[int, float] = {}
    for group in param_groups_layer_decay(model, 0.05, layer_decay=0.7):
        expected.update((id(p), group["lr_scale"]) for p in group["params"])
    rates = _rates(wrap(model, LayerDecay(decay=0.7)))
    own = {n: pytest.approx(expected[id(p)]) for n, p in model.named_parameters()}
    assert rates == own | {
        "norm.weight": 1.0,
        "norm.bias": 1.0,
    }  # with the head in BEiT and MAE, with the last block in timm


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("torchvision-vit", {"class_token": 0, "conv_proj.weight": 0, "encoder.pos_embedding": 0,
        "heads.head.weight": 3,
                             "encoder.layers.encoder_layer_1.mlp.0.weight": 2,
                             "encoder.ln.weight": 3}),
        ("transformers-vit", {"vit.embeddings.cls_token": 0, "classifier.weight": 3,
        "vit.layernorm.bias": 3}),
        ("timm-resnet", {"conv1.weight": 0, "bn1.weight": 0, "layer1.0.conv1.weight": 1,
        "fc.bias": 7}),
        ("timm-swin", {"patch_embed.proj.weight": 0, "layers.1.downsample.reduction.weight": 2,
        "norm.weight": 5}),
    ],
)  # fmt: skip
def test_layers_of_every_library(name: str, at: dict[str, int]) -> None:
    model = HOSTS[name].build()
    rates = _rates(wrap(model, LayerDecay(decay=0.5, input_shape=HOSTS[name].input_shape)), lr=0.8)
    blocks = max(at.values()) - 1
    assert {n: rates[n] for n in at} == {
        n: pytest.approx(0.8 * 0.5 ** (blocks + 1 - i)) for n, i in at.items()
    }
    assert len(rates) == len(list(model.parameters()))


def test_a_part_s_own_parameters_learn_with_the_part() -> None:
    """An attention pool's query lies behind the last block, though no layer of its own holds it;
    positions lie before."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=5,
        global_pool="map",
        class_token=False,
    )
    rates = _rates(wrap(model, LayerDecay(decay=0.5)))
    for name in (
        "attn_pool.latent",
        "attn_pool.kv.weight",
        "attn_pool.mlp.fc1.bias",
        "head.weight",
    ):
        assert rates[name] == 1.0, name
    assert rates["pos_embed"] == rates["patch_embed.proj.weight"] == 0.125


def test_changes_nothing_but_rates() -> None:
    model = HOSTS["timm-vit"].build()
    before = Snapshot(model)
    live = wrap(model, LayerDecay(decay=1.0))
    assert set(_rates(live).values()) == {1.0}
    live.undo()
    assert all(before.unchanged(i) for i in range(len(before._tensors)))


def test_what_another_technique_adds_learns_at_lr() -> None:
    model = HOSTS["timm-vit"].build()
    rates = _rates(wrap(model, [LayerDecay(), Adapter(width=4)]))
    added = {n: r for n, r in rates.items() if "adapter" in n}
    assert added
    assert set(added.values()) == {1.0}
    assert rates["head.weight"] == 1.0
    assert not any(n.startswith("blocks.0.attn.qkv") for n in rates)


def test_refuses_a_model_without_blocks_and_nonsense() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(BadInput, match="no 'block'"):
        wrap(model, LayerDecay())
    with pytest.raises(BadInput, match="decay"):
        LayerDecay(decay=1.5)
