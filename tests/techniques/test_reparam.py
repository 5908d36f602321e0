"""Branches fold into the layer they stand beside: the published numbers, and every kind by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques.inference.reparam._kernels import (
    average,
    centred,
    identity,
    serial,
    with_norm,
)
from greenvis.techniques.inference.reparam.reparam import Branches, Reparam
from greenvis.techniques.inference.tokens.token_merge import TokenMerge
from greenvis.testing import check_together

CASES = torch.load(Path(__file__).parents[1] / "fixtures" / "repvgg_fuse.pt", weights_only=True)


def _norm(state: dict[str, Tensor], name: str, dtype: torch.dtype) -> nn.BatchNorm2d:
    prefix = f"{name}."
    mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    norm = nn.BatchNorm2d(len(mine["weight"])).to(dtype)
    norm.load_state_dict(mine)
    return norm


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: f"stride{c['stride']}")
def test_three_branches_are_the_published_kernel(case: dict[str, Any]) -> None:
    state, groups, dtype = case["state_dict"], case["groups"], case["x"].dtype
    dense = state["rbr_dense.conv.weight"]
    sides = dense.shape[2:]
    parts = [
        with_norm(dense, _norm(state, "rbr_dense.bn", dtype)),
        with_norm(centred(state["rbr_1x1.conv.weight"], sides), _norm(state, "rbr_1x1.bn", dtype)),
    ]
    if "rbr_identity.weight" in state:
        same = identity(case["in_channels"], groups, sides, dense)
        parts.append(with_norm(same, _norm(state, "rbr_identity", dtype)))
    kernel = torch.stack([k for k, _ in parts]).sum(0)
    bias = torch.stack([b for _, b in parts]).sum(0)
    torch.testing.assert_close(kernel, case["kernel"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, case["bias"], atol=1e-5, rtol=1e-4)
    y = F.relu(F.conv2d(case["x"], kernel, bias, case["stride"], 1, 1, groups))
    torch.testing.assert_close(y, case["y_deploy"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(y, case["y_multi_branch"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_folds(bias: bool, affine: bool) -> None:
    conv = nn.Conv2d(4, 6, (3, 1), bias=bias, groups=2).double()
    norm = nn.BatchNorm2d(6, affine=affine, eps=1e-3).double().eval()
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    kernel, shift = with_norm(conv.weight, norm, conv.bias)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(x, kernel, shift, groups=2), norm(conv(x)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_equal_their_branches(groups: int, stride: int) -> None:
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    options: dict[str, Any] = {"stride": stride, "groups": groups}
    mix = torch.randn(6, 4 // groups, 1, 1, dtype=torch.float64)
    pads = (1, 2)

    def conv(kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, None, padding=pads, **options)

    torch.testing.assert_close(conv(centred(mix, (3, 5))), F.conv2d(x, mix, None, **options))
    row = torch.randn(6, 4 // groups, 1, 5, dtype=torch.float64)
    expected = F.conv2d(x, row, None, padding=(0, 2), **options)
    torch.testing.assert_close(conv(centred(row, (3, 5))), expected)
    pooled = F.avg_pool2d(F.conv2d(x, mix, groups=groups), (3, 5), stride, pads)
    torch.testing.assert_close(conv(average(mix, (3, 5))), pooled)
    first = torch.randn(2 * groups, 4 // groups, 1, 1, dtype=torch.float64)
    second = torch.randn(6, 2, 3, 5, dtype=torch.float64)
    middle = F.conv2d(x, first, groups=groups)
    expected = F.conv2d(middle, second, None, padding=pads, **options)
    torch.testing.assert_close(conv(serial(first, second, groups)), expected)
    w1, w2 = torch.randn(3, 4).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(serial(w1, w2, 1), w2 @ w1)


def test_every_branch_acts_and_folds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, (5, 7), padding="same", groups=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=4, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    branches: Any = ["1x1", "kx1", "1xk", "average", "serial", "small", "product"]
    x = torch.randn(4, 3, 17, 15)
    before = model.eval()(x)
    keys = [*model.state_dict()]
    live = gv.wrap(model, Reparam(branches=branches, input_shape=(3, 17, 15)))
    assert torch.equal(model(x), before)  # all begin at zero
    kinds = {b for m in model.modules() if isinstance(m, Branches) for b in m.zeros}
    assert kinds == {f"_{b}" for b in branches}
    with torch.no_grad():
        for parameter in live.declared.values():
            parameter.normal_(std=0.1)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-2)
    merged = live.merge()
    torch.testing.assert_close(merged(x), after, atol=1e-6, rtol=1e-5)
    assert [*merged.state_dict()] == keys
    assert type(merged[0]) is nn.Conv2d  # type: ignore[index]
    live.undo()
    assert torch.equal(model(x), before)


def test_a_weight_with_two_owners_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.a(x.flatten(1)))))

    with pytest.raises(BadInput, match="no layer for"):
        gv.wrap(Tied(), Reparam(input_shape=(3, 2, 2)))


def test_fp32_under_autocast() -> None:
    model = HOSTS["timm-resnet"].build().eval()
    live = gv.wrap(model, Reparam())
    with torch.no_grad():
        for parameter in live.declared.values():
            parameter.normal_(std=0.05)
    x = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped = model(x)
        merged = live.merge()(x)
    torch.testing.assert_close(merged, wrapped, atol=2e-2, rtol=2e-2)


def test_attention_is_still_found_beside_branches() -> None:
    result = check_together([(Reparam, {}), (TokenMerge, {"r": 2})], HOSTS["timm-vit"])
    assert result.outcome == "works", str(result)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"branches": ["small"], "small": 5}, "no layer for .small"),
        ({"targets": ["nothing"]}, "matches 'nothing'"),
        ({"branches": []}, "at least 1"),
    ],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.wrap(HOSTS["plain"].build(), Reparam(**options))
