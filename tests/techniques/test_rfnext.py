"""RF-Next: the published numbers, dilations that are found, and what follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import greenvis as gv
from greenvis import models
from greenvis.core import weights
from greenvis.core.attached import full_state_dict
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.inference.structure._dilations import (
    Branches,
    branch_sum,
    estimate,
    expand,
    merged_kernel,
    settings,
    shares,
)
from greenvis.techniques.inference.structure.rfnext import RFNext

DATA = Path(__file__).parents[1] / "fixtures"
DILATIONS = json.loads((DATA / "rfnext_dilations.json").read_text())
FIXTURE = torch.load(DATA / "rfnext.pt", weights_only=True)


def test_expansions_equal_the_published_ones() -> None:
    for case in DILATIONS["rf_expand"]:
        got = expand(
            case["dilation"], case["expand_rate"], case["num_branches"], case["min_dilation"],
            case["max_dilation"],
        )  # fmt: skip
        assert [[*rate] for rate in got] == case["rates"], case
    for case in DILATIONS["local_searcher_expands_rate"]:
        got = expand([case["d"]], case["exp_rate"], 3)
        assert [r for (r,) in got] == sorted(set(case["rates"]))


def test_the_trajectory_equals_the_published_one() -> None:
    for step in DILATIONS["search_trajectory"][1:]:
        rates = [tuple(rate) for rate in step["rates_before"]]
        got = estimate(rates, torch.tensor(step["weights"]))
        assert [*got] == step["estimated"]
        assert [[*rate] for rate in expand(got, 0.5, 3)] == step["rates_after"]
        conv = nn.Conv2d(2, 2, 3, padding=2, dilation=2)
        assert [*settings(conv, got)["padding"]] == step["padding"]


def test_the_one_dimensional_operator_equals_the_published_one() -> None:
    case = FIXTURE["conv1d"]
    rates = [(rate,) for rate in case["rates"]]

    def branch(rate: tuple[int, ...]) -> Tensor:
        return F.conv1d(case["x"], case["weight"], case["bias"], 1, rate[0], rate[0])

    got = branch_sum(branch, rates, case["branch_weights"], F.relu)
    torch.testing.assert_close(got, case["y"], atol=1e-5, rtol=1e-4)
    assert estimate(rates, case["branch_weights"]) == (case["estimated"],)
    assert [r for (r,) in expand([case["estimated"]], 0.1, 3)] == case["new_rates"]


@pytest.mark.parametrize("branches", [2, 3, 4, 5])
def test_with_a_gap_every_dilation_can_move(branches: int) -> None:
    for rate in range(1, 40):
        rates = [r for (r,) in expand([rate], 0.1, branches, gap=1)]
        assert rates == sorted(set(rates))
        assert rates[-1] > rate
        assert rate == 1 or rates[0] < rate


@pytest.mark.parametrize(
    ("kernel", "dilation", "options"),
    [
        ((3, 3), (1, 1), {}),
        ((3, 5), (1, 2), {"stride": 2, "padding": (1, 4)}),
        ((1, 7), (1, 1), {"padding": (0, 3), "groups": 2}),
        ((3, 3), (2, 2), {"padding": "same", "groups": 4}),
        ((5, 3), (1, 1), {"padding": "valid", "bias": False}),
        ((3, 3), (1, 1), {"padding": 1, "padding_mode": "reflect"}),
        ((3, 3), (1, 1), {"padding": "same", "padding_mode": "circular"}),
    ],
)
def test_branches_are_the_weighted_sum_and_keep_the_size(
    kernel: tuple[int, int], dilation: tuple[int, int], options: dict[str, Any]
) -> None:
    options = {"padding": 1, **options}
    conv = nn.Conv2d(4, 8, kernel, dilation=dilation, **options).double()
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3).double())
    x = torch.randn(2, 4, 13, 15, dtype=torch.float64)
    size = conv(x).shape
    live = gv.wrap(
        model, RFNext(mode="multi", targets=["0"], input_shape=(4, 13, 15), epochs=2, every=1)
    )
    layer: Any = model[0]
    assert len(layer.rates) > 1
    with torch.no_grad():
        layer.weights.copy_(torch.tensor([0.02, -0.05, 0.01]))
    alphas = shares(layer.weights[: len(layer.rates)])
    expected = torch.zeros(size, dtype=torch.float64)
    for rate, alpha in zip(layer.rates, alphas, strict=True):
        more = {**options, **{k: v for k, v in settings(conv, rate).items() if k == "padding"}}
        other = nn.Conv2d(4, 8, kernel, dilation=rate, **more).double()
        other.load_state_dict(conv.state_dict())
        expected = expected + alpha * other(x)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == size
    live.undo()
    assert model[0] is conv
    assert conv.dilation == dilation


def test_the_padding_of_a_class_that_pads_by_itself_follows() -> None:
    conv = Conv2dSame(3, 4, 3, stride=2)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(2, 3, 15, 15)
    gv.wrap(model, RFNext(targets=["0"], input_shape=(3, 15, 15)))
    layer: Any = model[0]
    other = Conv2dSame(3, 4, 3, stride=2, dilation=2)
    other.load_state_dict(conv.state_dict())
    torch.testing.assert_close(layer.at((2, 2), x), other(x))


@pytest.mark.parametrize("groups", [1, 2])
def test_branches_fold_into_one_larger_kernel(groups: int) -> None:
    weight = torch.randn(4, 4 // groups, 3, 5, dtype=torch.float64)
    rates, weights = [(1, 2), (2, 3), (3, 4)], torch.tensor([0.02, -0.05, 0.01]).double()
    x = torch.randn(2, 4, 11, 17, dtype=torch.float64)
    kernel = merged_kernel(weight, rates, weights)
    assert kernel.shape[2:] == (7, 17)

    def branch(rate: tuple[int, ...]) -> Tensor:
        pads = [rate[0], 2 * rate[1]]
        return F.conv2d(x, weight, None, 1, pads, rate, groups)

    got = F.conv2d(x, kernel, None, 1, [3, 8], 1, groups)
    torch.testing.assert_close(got, branch_sum(branch, rates, weights))


class _Chop(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size]


class _Own(nn.Conv1d):
    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__(channels, channels, kernel, dilation=dilation)
        self.left = (kernel - 1) * dilation

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (self.left, 0)))


class _Parent(nn.Module):
    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.left = (kernel - 1) * dilation
        self.conv = nn.Conv1d(channels, channels, kernel, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.left, 0)))


class _Sequence(nn.Module):
    """Reads the rows of an image one pixel after another."""

    def __init__(self, kind: str, kernel: int, dilation: int = 4) -> None:
        super().__init__()
        reach = (kernel - 1) * dilation
        self.first = nn.Conv1d(3, 6, 1)
        conv = nn.Conv1d(6, 6, kernel, dilation=dilation, padding=reach if kind == "chop" else 0)
        self.body: nn.Module = {
            "chop": lambda: nn.Sequential(conv, _Chop(reach)),
            "pad": lambda: nn.Sequential(nn.ConstantPad1d((reach, 0), 0.0), conv),
            "own": lambda: nn.Sequential(_Own(6, kernel, dilation)),
            "parent": lambda: _Parent(6, kernel, dilation),
        }[kind]()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.first(x.flatten(2)))).mean(2))


@pytest.mark.parametrize("kind", ["chop", "pad", "own", "parent"])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("mode", ["single", "multi"])
def test_causal_convolutions_stay_causal(kind: str, kernel: int, mode: Any) -> None:
    torch.manual_seed(1)
    model = _Sequence(kind, kernel)
    live = gv.wrap(
        model,
        RFNext(mode=mode, fold=mode == "multi", spread=0.5, epochs=1, every=1,
               input_shape=(3, 8, 8)),
    )  # fmt: skip
    (layer,) = (m for m in model.modules() if isinstance(m, Branches))
    assert layer.rates == [(2,), (4,), (6,)]
    x = torch.randn(2, 6, 64)
    later = x.clone()
    later[:, :, 40:] = 9.0
    body = model.body
    assert body(x).shape == x.shape
    torch.testing.assert_close(body(x)[:, :, :40], body(later)[:, :, :40], atol=0, rtol=0)
    with torch.no_grad():
        layer.weights.copy_(torch.tensor([0.01, 0.01, 0.09]))
    live.epoch_end()
    wrapped = body(x)
    assert (layer.rates == [(5,)]) == (mode == "single")
    live.merge()
    assert not any(isinstance(m, Branches) for m in model.modules())
    torch.testing.assert_close(model.body(x), wrapped)
    live.undo()
    assert model.body(x).shape == x.shape


def test_a_causal_convolution_that_nothing_names_is_refused() -> None:
    class Silent(_Sequence):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body[0](self.first(x.flatten(2)))[:, :, :-8].mean(2))  # type: ignore[index]

    model = Silent("chop", 3)
    model.body = model.body[:1]  # type: ignore[index]
    with pytest.raises(BadInput, match="would not follow another dilation"):
        gv.wrap(model, RFNext(input_shape=(3, 8, 8)))


def test_a_search_ends_with_plain_convolutions_of_the_dilation_found() -> None:
    model = HOSTS["timm-resnet"].build()
    keys = [*model.state_dict()]
    live = gv.wrap(model, RFNext(epochs=4, every=2, spread=0.5))
    layer: Any = model.layer1[0].conv1  # type: ignore[index, union-attr]
    assert live.installed[0].unmergeable
    for turn in range(4):
        with torch.no_grad():  # the largest wins
            layer.weights[len(layer.rates) - 1] = 9.0
        live.epoch_end()
        assert len(layer.rates) == (1 if turn == 3 else 3 if turn else 2)
    assert layer.rates == [(3, 3)]
    facts = live.facts()["dilations"]
    merged = live.merge()
    conv = merged.layer1[0].conv1  # type: ignore[index, union-attr]
    assert conv.dilation == (3, 3) == tuple(facts["layer1.0.conv1"][0])
    assert conv.padding == (3, 3)
    assert [*merged.state_dict()] == keys
    live.undo()
    assert conv.dilation == (1, 1)


def test_dilations_are_saved_beside_the_weights(tmp_path: Path) -> None:
    ref = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "num_classes": 5, "img_size": 64}
    model = models.build("timm/resnet18", **ref)
    live = gv.wrap(model, RFNext(epochs=1, every=1))
    for layer in model.modules():
        if isinstance(layer, Branches):
            with torch.no_grad():
                layer.weights[len(layer.rates) - 1] = 9.0
    live.epoch_end()
    live.merge()
    models.save(model, tmp_path / "model.safetensors", ref="timm/resnet18", options=ref)
    again = models.build("file:model.safetensors", folder=tmp_path)
    x = torch.rand(2, 3, 64, 64)
    assert again.layer1[0].conv1.dilation == (2, 2)  # type: ignore[index, union-attr]
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    state = full_state_dict(model)
    with pytest.raises(RuntimeError, match="dilation"):  # one without greenvis
        models.build("timm/resnet18", **ref).load_state_dict(state)
    plain = models.build("timm/resnet18", **ref)
    state["greenvis.kept.settings.layer1.0.bn1.dilation"] = torch.tensor([2, 2])
    with pytest.raises(BadInput, match="belong to another model"):
        weights.load_state(plain, state)
    assert plain.layer1[0].conv1.dilation == (1, 1)  # type: ignore[index, union-attr]


def test_rates_go_with_the_state() -> None:
    model, other = (HOSTS["timm-resnet"].build() for _ in range(2))
    live, again = (gv.wrap(m, RFNext(epochs=2, every=1)) for m in (model, other))
    layer: Any = model.layer1[0].conv1  # type: ignore[index, union-attr]
    with torch.no_grad():
        layer.weights[1] = 9.0
    live.epoch_end()
    again.load_state_dict({k: v.clone() for k, v in live.state_dict().items()})
    assert again.facts() == live.facts()
    again.epoch_end()
    assert not again.installed[0].unmergeable
    state = {"epochs": torch.tensor(1)}
    with pytest.raises(GreenvisError, match="other layers"):
        again.installed[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"every": 4, "epochs": 3}, "would take no step"), ({"targets": ["fc"]}, "no convolution")],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.wrap(HOSTS["timm-resnet"].build(), RFNext(**options))
