"""Structure is found by what a model does, on every host, and looking leaves no mark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import HOSTS
from torch import nn

from greenvis.core.surgery import Snapshot
from greenvis.errors import BadInput
from greenvis.models.structure import example_input, reached, view
from greenvis.models.structure.layout import layouts
from greenvis.models.structure.summary import describe
from greenvis.models.structure.trace import trace

# host: attentions, mlps, blocks, prefix tokens, heads of the first attention, classifier
EXPECTED = {
    "timm-vit": (3, 3, 3, 1, 4, ("head",)),
    "timm-deit-distilled": (2, 2, 2, 2, 2, ("head", "head_dist")),
    "timm-deit3": (2, 2, 2, 1, 2, ("head",)),
    "timm-eva02": (2, 2, 2, 1, 2, ("head",)),
    "timm-dinov2-registers": (2, 2, 2, 5, 2, ("head",)),
    "timm-swin": (4, 4, 4, 0, 2, ("head.fc",)),
    "timm-convnext": (0, 5, 5, 0, None, ("head.fc",)),
    "timm-resnet": (0, 0, 6, 0, None, ("fc",)),
    "timm-efficientnet-lite": (0, 0, 8, 0, None, ("classifier",)),
    "timm-mobilevit": (9, 9, 16, 0, 4, ("head.fc",)),
    "torchvision-vit": (2, 2, 2, 1, 2, ("heads.head",)),
    "torchvision-swin": (4, 4, 4, 0, 2, ("head",)),
    "torchvision-resnet": (0, 0, 4, 0, None, ("fc",)),
    "torchvision-mobilenet": (0, 0, 5, 0, None, ("classifier.3",)),
    "transformers-vit": (2, 2, 2, 1, 2, ("classifier",)),
    "transformers-dinov2": (2, 2, 2, 1, 2, ("classifier",)),
    "transformers-swin": (4, 4, 4, 0, 2, ("classifier",)),
    "transformers-convnext": (0, 4, 4, 0, None, ("classifier",)),
    "transformers-clip": (2, 2, 2, 1, 2, ("classifier",)),
    "plain": (2, 1, 0, 0, 2, ("classify",)),
}


@pytest.mark.parametrize("name", HOSTS)
def test_finds_the_parts_and_leaves_no_mark(name: str) -> None:
    host = HOSTS[name]
    model = host.build()
    before = Snapshot(model)
    x = torch.rand(1, *host.input_shape)
    random = torch.get_rng_state()
    found = view(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert all(
        m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules()
    )
    heads = found.attention[0].heads if found.attention else None
    counts = (
        len(found.attention),
        len(found.mlps),
        len(found.blocks),
        found.prefix_tokens,
        heads,
        found.heads,
    )
    assert counts == EXPECTED[name]
    for path in (*found.linears, *found.convs, *found.norms, *found.blocks):
        model.get_submodule(path)
    assert all(
        a.kind == "multihead" or (a.inputs and a.out and (a.qkv or (a.q and a.k and a.v)))
        for a in found.attention
    )
    assert all(isinstance(row, tuple) and len(row) == 2 for row in describe(found))


def test_roles_follow_the_data_not_the_names() -> None:
    plain = view(HOSTS["plain"].build(), torch.rand(1, 3, 32, 32))
    assert plain.attention[0].inputs == ("wq", "wk", "wv")
    assert plain.attention[0].out == "wo"
    assert plain.role("attention") == ("wq", "wk", "wv", "wo", "layer.self_attn")
    assert plain.role("conv") == ("stem.0", "to_tokens")
    eva = view(HOSTS["timm-eva02"].build())
    assert (eva.mlps[0].up, eva.mlps[0].gate, eva.mlps[0].down) == (
        "blocks.0.mlp.fc1_x", "blocks.0.mlp.fc1_g", "blocks.0.mlp.fc2",
    )  # fmt: skip
    assert "rope" in eva.flags


def test_flags() -> None:
    swin = view(HOSTS["torchvision-swin"].build(), torch.rand(1, 3, 32, 32))
    assert swin.attention[0].kind == "functional"
    assert {"features.1.0.attn.qkv", "features.1.0.attn.proj"} <= swin.functional
    assert "windowed" in swin.flags
    assert "fixed_grid" in view(HOSTS["timm-vit"].build()).flags
    resnet = view(HOSTS["timm-resnet"].build(), torch.rand(1, 3, 64, 64))
    assert resnet.flags == {"batch_norm"}

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return self.fc(x - x.mean(0))

    assert "batch_dependent" in view(Centred()).flags


@pytest.mark.parametrize(
    ("name", "path", "axis", "width"),
    [
        ("timm-vit", "blocks.1", -1, 32),
        (
            "timm-convnext",
            "stages.0.blocks.0",
            1,
            8,
        ),  # on a map of 8 × 8: the shape alone does not tell
        ("timm-swin", "layers.1.blocks.0", -1, 32),
        ("torchvision-swin", "features.1.0.attn", -1, 16),
        ("transformers-convnext", "convnext.encoder.stages.1.layers.0", 1, 32),
        ("timm-mobilevit", "stages.0.0", 1, 16),
    ],
)
def test_layouts_tell_where_the_channels_are(name: str, path: str, axis: int, width: int) -> None:
    found = view(HOSTS[name].build(), torch.rand(1, *HOSTS[name].input_shape), probe=False)
    assert (found.layouts[path].channels, found.layouts[path].width) == (axis, width)


def test_a_computed_weight_is_known_as_such() -> None:
    from timm.layers import StdConv2d

    model = nn.Sequential(
        StdConv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    found = view(model, torch.rand(1, 3, 16, 16))
    assert found.computed == {"0"}
    assert found.heads == ("4",)


@pytest.mark.parametrize(
    "name", ["timm-vit", "transformers-swin", "torchvision-vit", "timm-mobilevit"]
)
def test_example_input_comes_from_the_configuration(name: str) -> None:
    model = HOSTS[name].build()
    side = 64 if name == "timm-mobilevit" else 32
    assert example_input(model).shape == (1, 3, side, side)


def test_example_input_of_a_flat_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    assert example_input(model).shape == (1, 1, 28, 28)
    assert view(model).heads == ("3",)


def test_a_headless_model_has_no_head() -> None:
    import timm

    model = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(BadInput, match=r"no 'head'.*it has"):
        view(model, torch.rand(1, 3, 64, 64)).role("head")


def test_errors_say_what_was_seen() -> None:
    found = view(HOSTS["timm-resnet"].build(), torch.rand(1, 3, 64, 64))
    with pytest.raises(BadInput, match="did you mean 'attention'"):
        found.role("atention")
    with pytest.raises(BadInput, match=r"no 'attention'.*it has 17 conv"):
        found.role("attention")
    with pytest.raises(BadInput, match="failed in 'patch_embed'"):
        view(HOSTS["timm-vit"].build(), torch.rand(1, 3, 17, 17))

    class Words(nn.Module):
        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return tokens

    with pytest.raises(BadInput, match="no image shape found"):
        view(Words())


def test_reached_says_what_could_learn() -> None:
    model = nn.ModuleDict({"used": nn.Linear(12, 2), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x.flatten(1))  # type: ignore[method-assign]
    model["used"].weight.requires_grad_(False)
    assert reached(model, torch.rand(1, 3, 2, 2)) == {"used.weight", "used.bias"}
    assert reached(model, torch.rand(1, 3, 2, 2), ["used.bias", "unused.bias"]) == {"used.bias"}
    assert not model["used"].weight.requires_grad
    assert model["used"].bias.grad is None


@pytest.mark.slow
def test_one_model_of_each_timm_family() -> None:
    """On the meta device, without weights: a classifier is found in all but those that come without
    one."""
    import timm

    families: dict[str, str] = {}
    for name in sorted(timm.list_models(), key=len):
        families.setdefault(timm.models._registry._model_to_module[name], name)
    headless = []
    for name in families.values():
        with torch.device("meta"):
            model = timm.create_model(name)
        found = view(model, probe=False)
        assert found.convs or found.linears
        if not found.heads:
            headless.append(name)
        ambiguous = [a for a in found.attention if a.kind != "multihead" and not a.inputs]
        assert len(ambiguous) <= len(found.attention) / 2, name
    assert len(families) > 80
    assert len(headless) <= 12, headless


@pytest.mark.parametrize(
    ("name", "prefix", "stages", "pooling"),
    [
        ("timm-deit-distilled", "before", [2], "prefix token"),
        ("timm-dinov2-registers", "before", [2], "prefix token"),
        ("timm-eva02", "before", [2], "mean"),
        ("timm-swin", "", [2, 2], "mean"),
        ("timm-convnext", "", [1, 1, 2, 1], "mean"),
        ("torchvision-vit", "before", [2], "prefix token"),
        ("torchvision-mobilenet", "", [1, 2, 2], "mean"),
        ("transformers-clip", "before", [2], "mean"),
        ("plain", "", [], "mean"),
    ],
)
def test_stages_pooling_and_where_prefix_tokens_stand(
    name: str, prefix: str, stages: list[int], pooling: str
) -> None:
    found = view(HOSTS[name].build(), HOSTS[name].input_shape, probe=False)
    assert (found.prefix_position, [len(s) for s in found.stages], found.pooling) == (
        prefix,
        stages,
        pooling,
    )
    assert [b for stage in found.stages for b in stage] == list(found.blocks)
    rows = dict(describe(found))
    assert rows["pooling"] == pooling
    assert rows["prefix tokens"].endswith("before the patches") == bool(prefix)


def test_attention_pooling_and_tokens_behind() -> None:
    from timm.models.vision_transformer import VisionTransformer

    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    assert (
        view(VisionTransformer(**size, class_token=False, global_pool="map"), probe=False).pooling
        == "attention"
    )

    class Behind(VisionTransformer):
        def _pos_embed(self, x: Any) -> Any:
            return torch.cat([x + self.pos_embed[:, 1:], self.cls_token.expand(len(x), -1, -1)], 1)

    found = view(Behind(**size), probe=False)
    assert (found.prefix_tokens, found.prefix_position) == (1, "behind")


@pytest.mark.parametrize(
    ("name", "path", "axis"),
    [
        ("timm-resnet", "bn1", 1),
        ("timm-resnet", "act1", 1),
        ("timm-resnet", "maxpool", 1),
        ("timm-swin", "layers.1.blocks.0.norm1", -1),
        ("timm-convnext", "stages.1.blocks.0.norm", -1),
    ],
)
def test_parts_without_weights_to_tell_by_lie_as_their_neighbours_do(
    name: str, path: str, axis: int
) -> None:
    seen = trace(HOSTS[name].build(), torch.rand(1, *HOSTS[name].input_shape))
    assert layouts(seen, [path])[path].channels == axis


def test_a_state_space_is_no_attention_and_a_gate_no_block() -> None:
    from timm.models.efficientvim import EfficientViM

    model = EfficientViM(
        num_classes=5, embed_dim=(8, 16, 24), depths=(1, 2, 1), state_dim=(9, 6, 4)
    )
    found = view(model, torch.rand(1, 3, 128, 128))
    blocks = ("stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0")
    assert (found.attention, found.blocks) == ((), blocks)
    assert tuple(mlp.path for mlp in found.mlps) == tuple(f"{b}.ffn" for b in blocks)
    assert [found.layouts[b].width for b in blocks] == [8, 16, 16, 24]
