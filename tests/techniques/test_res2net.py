"""Res2Net: converted bottlenecks compute what the published block computes, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques.inference.structure.res2net import Res2Net, Split, multi_scale
from greenvis.testing import Host, check_technique

FIXTURE = Path(__file__).parents[1] / "fixtures" / "res2net_bottle2neck.pt"
CASES = torch.load(FIXTURE, weights_only=True)["cases"]


def _host(block: nn.Module, channels: int) -> nn.Sequential:
    """One block between an image of three channels and logits, so that it is found by itself."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip


def _plain(inplanes: int, planes: int, stride: int, down: nn.Module | None, **more: Any) -> Any:
    return Bottleneck(inplanes, planes, stride, down, **more)


def _convert(block: nn.Module, inplanes: int, side: int, **options: Any) -> nn.Module:
    model = _host(block, inplanes)
    model(torch.rand(2, 3, side, side))
    gv.wrap(model, Res2Net(input_shape=(3, side, side), **options))
    return model[1]


def _as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published block's tensors: its convolutions stand in conv2's place."""
    return {re.sub(r"^(convs|bns)\.", r"conv2.\1.", k): v for k, v in state.items()}


def _downsample(inplanes: int, planes: int, stride: int, v1b: bool) -> nn.Sequential:
    pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if v1b else []
    conv = nn.Conv2d(inplanes, planes * 4, 1, 1 if v1b else stride, bias=False)
    return nn.Sequential(*pool, conv, nn.BatchNorm2d(planes * 4))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['stype']}-{c['scale']}")
def test_a_converted_block_equals_the_published_one(case: dict[str, Any]) -> None:
    inplanes, planes, stride = case["inplanes"], case["planes"], case["stride"]
    down = None
    if case["stype"] == "stage":
        down = _downsample(inplanes, planes, stride, case.get("v1b_downsample", False))
    block = _plain(inplanes, planes, stride, down)
    block = _convert(block, inplanes, 10, scale=case["scale"], width=case["baseWidth"])
    assert block.conv2.width == case["width"]
    block.load_state_dict(_as_ours(case["state_dict"]))
    for mode, key in ((False, "y_eval"), (True, "y_train")):
        got = block.train(mode)(case["x"])
        torch.testing.assert_close(got, case[key], atol=1e-5, rtol=1e-4)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("scale", [1, 2, 3, 8])
@pytest.mark.parametrize("stride", [0, 1, 2])  # 0: within a stage
@pytest.mark.parametrize("cardinality", [1, 4])
def test_a_converted_block_equals_the_librarys(scale: int, stride: int, cardinality: int) -> None:
    torch.manual_seed(3)
    planes, inplanes = 16, 24 if stride else 64
    base = 24 if scale < 8 else 16
    down = _downsample(inplanes, planes, stride, stride == 2) if stride else None
    reference = Bottle2neck(
        inplanes, planes, stride or 1, down, cardinality, base, scale, norm_layer=nn.BatchNorm2d
    )
    for norm in reference.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 2)
    down = _downsample(inplanes, planes, stride, stride == 2) if stride else None
    block = _plain(inplanes, planes, stride or 1, down, cardinality=cardinality, base_width=64)
    # the library counts base widths per group
    block = _convert(block, inplanes, 9, scale=scale, width=base)
    state = reference.state_dict()
    block.load_state_dict(_as_ours(state))
    x = torch.randn(3, inplanes, 9, 9)
    for mode in (False, True):
        got = block.train(mode)(x)
        torch.testing.assert_close(got, reference.train(mode)(x), atol=1e-6, rtol=1e-5)


def test_parts_that_are_not_alike_pass_by_whole() -> None:
    convs = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    norms = [nn.BatchNorm2d(3).eval() for _ in range(3)]
    x = torch.randn(2, 11, 5, 4)  # three parts of 3, and 2 channels
    got = multi_scale(x, 3, convs, norms, nn.ReLU())
    y1 = F.relu(norms[0](convs[0](x[:, :3])))
    y2 = F.relu(norms[1](convs[1](x[:, 3:6] + y1)))
    y3 = F.relu(norms[2](convs[2](x[:, 6:9] + y2)))
    torch.testing.assert_close(got, torch.cat([y1, y2, y3, x[:, 9:]], 1))


def _resnet(**more: Any) -> ResNet:
    block: Any = Bottleneck
    sizes: Any = {"channels": (8, 8, 16, 16), "stem_width": 8}
    return ResNet(block, (2, 1, 1, 1), num_classes=5, **sizes, **more)


def _torchvision() -> nn.Module:
    class Narrow(TorchvisionResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
            return super()._make_layer(block, planes // 8, *args, **kwargs)

    model = Narrow(TorchvisionBottleneck, [2, 1, 1, 1])
    model.fc = nn.Linear(256, 5)
    model.__class__ = TorchvisionResNet  # type: ignore[assignment]
    return model


HOSTS = [
    Host("timm", _resnet, (3, 40, 40), 5),
    Host("timm-se", lambda: _resnet(block_args={"attn_layer": "se"}), (3, 40, 40), 5),
    Host("timm-groups", lambda: _resnet(cardinality=2, base_width=32), (3, 40, 40), 5),
    Host("timm-silu", lambda: _resnet(act_layer=nn.SiLU), (3, 40, 40), 5),
    Host("timm-blur", lambda: _resnet(aa_layer=BlurPool2d), (3, 40, 40), 5),
    Host("torchvision", _torchvision, (3, 40, 40), 5),
]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("host", reversed(HOSTS), ids=lambda host: host.name)
def test_contract_on_bottlenecks(host: Host) -> None:
    results = check_technique(Res2Net, [host])
    if host.name == "timm-blur":  # a blur between the convolutions is of one width
        assert all("does not run" in r.reason for r in results[1:])
        results = results[:1]
    assert {r.outcome for r in results} == {"works"}, [str(r) for r in results]


def test_keep_has_the_width_and_a_share_of_the_macs() -> None:
    model = _resnet()
    conv = model.layer1[1].conv2
    live = gv.wrap(model, Res2Net(scale=4))
    split = model.layer1[1].conv2
    assert isinstance(split, Split)
    weights = sum(c.weight.numel() for c in split.convs)  # type: ignore[misc, operator]
    assert weights / conv.weight.numel() == 3 / 16
    for i, part in enumerate(split.convs):  # the diagonal blocks of the kernel
        assert torch.equal(part.weight, conv.weight[2 * i : 2 * i + 2, 2 * i : 2 * i + 2])
    assert live.facts()["res2net_widths"]["layer1.1.conv2"] == 2
    assert model.layer1[0].conv2.pool is not None
    assert split.pool is None


def test_equal_has_about_the_macs_there_were() -> None:
    from greenvis.meters.flops import count

    x = torch.rand(1, 3, 40, 40)
    before = count(_resnet(), x).macs
    model = _resnet()
    gv.wrap(model, Res2Net(scale=4, width="equal"))
    assert 0.8 < count(model, x).macs / before <= 1


def test_batch_norms_of_parts_fold() -> None:
    model = _resnet().eval()
    gv.wrap(model, Res2Net(scale=4))
    gv.fold_norms(model.eval(), torch.rand(2, 3, 40, 40))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.layer1.modules())


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (lambda: ResNet(_basic(), (1, 1, 1, 1), num_classes=5), {}, "has no bottleneck"),
        (_resnet, {"scale": 9}, "too few for 9 parts"),
        (_resnet, {"width": 0}, "from 1 on"),
        (_resnet, {"targets": ["layer1.0.conv1"]}, "has no bottleneck"),
        (_resnet, {"targets": ["convolution"]}, "matches 'convolution'"),
    ],
)
def test_refusals(model: Any, options: dict[str, Any], says: str) -> None:
    net = model()
    with pytest.raises(BadInput, match=says):
        gv.wrap(net, Res2Net(**options))


def _basic() -> Any:
    from timm.models.resnet import BasicBlock

    return BasicBlock
