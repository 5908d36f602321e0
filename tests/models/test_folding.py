"""Folded batch norms give the same answers, whatever the library; what cannot be folded stays; all
of it can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import greenvis as gv
from greenvis import models
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput
from greenvis.meters import record
from greenvis.models.folding import fold_norms, folded

CONVOLUTIONAL = [
    "timm-resnet", "timm-efficientnet-lite", "timm-mobilevit", "torchvision-resnet",
    "torchvision-mobilenet", "plain",
]  # fmt: skip


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def lived(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales of their own, as training does."""
    generator = torch.Generator().manual_seed(4)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        for tensor, low, high in (
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.3, 2),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -1, 1),
        ):
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


class Block(nn.Module):
    """A convolution and its norm, and beside them what a test puts there."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv, norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Read(Block):
    """Something else reads what the convolution gives."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((self.norm(y) + y).mean((2, 3)))


class Twice(Block):
    """The convolution runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x))


@pytest.mark.parametrize("host", CONVOLUTIONAL)
def test_a_folded_model_answers_the_same_and_comes_back(host: str) -> None:
    model, x = lived(HOSTS[host].build()), torch.rand(3, *HOSTS[host].input_shape)
    modules, state = [*model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want, there = logits_of(model(x)), norms(model)
        model.train()
        with folded(model, x):
            got, left = logits_of(model(x)), norms(model)
        again = logits_of(model(x))
    assert there > left == 0
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.equal(got, want)  # other weights were at work
    assert torch.equal(again, want)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@given(
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30)
def test_the_folded_weights_are_the_papers(
    stride: int, kernel: int, groups: int, bias: bool, affine: bool, turned: bool
) -> None:
    kind: Any = nn.ConvTranspose2d if turned else nn.Conv2d
    conv = kind(4, 4, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
    model = lived(
        nn.Sequential(conv, nn.BatchNorm2d(4, affine=affine, eps=1e-2), nn.Flatten())
    ).double()
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    if turned and groups > 1:
        with pytest.raises(BadInput, match="1 batch norms, none of them right behind"):
            fold_norms(model, x)
        return
    norm: Any = model[1]
    scale = (norm.weight if affine else 1) / torch.sqrt(norm.running_var + norm.eps)
    want = conv.weight * (scale[None, :, None, None] if turned else scale[:, None, None, None])
    shift = (norm.bias if affine else 0) + ((conv.bias if bias else 0) - norm.running_mean) * scale
    with torch.no_grad():
        before = model(x)
        assert fold_norms(model, x).convolutions == ("0",)
        torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model[0].weight, want)
    torch.testing.assert_close(model[0].bias, shift)
    assert isinstance(model[1], nn.Identity)


def test_what_cannot_be_folded_is_refused_and_nothing_changes() -> None:
    x = torch.rand(2, 4, 6, 6)
    hooked = Block(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    hooked.norm.register_forward_hook(lambda m, a, o: None)
    cases = {
        "otherwise": Read(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        "1 batch norms, none": Twice(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        "batch norms, none": Block(StdConv2d(4, 4, 3), nn.BatchNorm2d(4)),
        "of them right": Block(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "a convolution that": hooked,
        "no batch norm": Block(nn.Conv2d(4, 4, 3), nn.Identity()),
    }
    for said, model in cases.items():
        lived(model).train()
        modules = [*model.modules()]
        with pytest.raises(BadInput, match=said):
            fold_norms(model, x)
        assert all(m.training for m in modules)
        assert [id(m) for m in model.modules()] == [id(m) for m in modules]
        assert all(not m._forward_hooks for m in modules if m is not hooked.norm)


def test_those_that_cannot_take_part_stay() -> None:
    model = lived(
        nn.Sequential(
            StdConv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
        )
    )
    folding = fold_norms(model, torch.rand(2, 3, 8, 8))
    assert folding.convolutions == ("3",)
    assert norms(model) == 1


def test_weights_stay_channels_last() -> None:
    model = models.build(
        "timm/tf_efficientnet_lite0", num_classes=3, memory_format="channels_last"
    ).eval()
    fold_norms(model, torch.rand(1, 3, 32, 32))
    expand = model.get_submodule("blocks.1.0.conv_pw")
    assert isinstance(expand, nn.Conv2d)
    assert model.get_submodule("conv_stem").weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]
    assert expand.bias is not None


@pytest.mark.parametrize("at", [(1, 2), ("bn1", "layer1")])
def test_samples_leave_a_folded_model_as_before(at: tuple[int | str, ...]) -> None:
    live = gv.wrap(lived(HOSTS["timm-resnet"].build()), gv.EarlyExit(at=at, threshold=0.25))
    x = torch.rand(6, *HOSTS["timm-resnet"].input_shape)
    model = live.for_inference()
    for head in live.installed[0].exits.heads:  # type: ignore[attr-defined]
        nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with live.operating_points()["set"] as before:
            want = model(x)
        with folded(model, x), live.operating_points()["set"] as after:
            torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert after["exits"] == before["exits"]
    assert sum(after["exits"][:2]) > 0


RECIPE = """\
name: folded
data: {name: digits, train: 60, test: 40, img_size: 32, in_chans: 3}
model: {ref: torchvision/resnet18, fold_norms: true}
train: {epochs: 1, batch_size: 20, threads: 1}
arms: {whole: {}, plain: {model: {fold_norms: false}}}
meter: {codecarbon: false}
"""


@pytest.mark.slow
def test_a_recipe_measures_the_folded_model_and_keeps_the_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "folded.yaml"
    path.write_text(RECIPE)
    with pytest.raises(
        BadInput,
        match=r"folded.yaml:5: VisionTransformer has no batch norm: there is nothing to fold",
    ):
        gv.run(
            path, overrides=["model.ref=timm/test_vit", "model.img_size=32"], runs=tmp_path / "none"
        )
    assert not (tmp_path / "none" / "folded").exists()
    gv.run(path, runs=tmp_path / "runs")
    found = {r.header["arm"]: r.facts for r in map(record.read, record.find([tmp_path / "runs"]))}
    assert found["whole"]["model"]["fold_norms"]
    assert "fold_norms" not in found["plain"]["model"]
    assert found["whole"]["accuracy"] == found["plain"]["accuracy"]
    assert found["whole"]["macs"] == found["plain"]["macs"]
    gone = found["plain"]["params"] - found["whole"]["params"]
    assert gone == sum(
        m.num_features
        for m in models.build("torchvision/resnet18").modules()
        if isinstance(m, _BatchNorm)
    )
    kept = models.build(f"file:{tmp_path / 'runs/folded/whole/seed0/model.safetensors'}")
    assert norms(kept) == 20
