"""Pruning: what stays is what was there, coupled layers lose the same units, a smaller model is
saved and built again, and each width serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import greenvis as gv
from greenvis import models
from greenvis.core import weights
from greenvis.core.attached import ATTACHED, full_state_dict
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.inference.structure._cuts import removed
from greenvis.techniques.inference.structure.prune import Prune

REF = "timm/vit_tiny_patch16_224"
OPTIONS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 1,
    "num_heads": 3,
    "num_classes": 5,
}
X = torch.rand(3, 3, 16, 16)


def _vit() -> Any:
    torch.manual_seed(0)
    return VisionTransformer(**OPTIONS).eval()  # type: ignore[arg-type]


def _resnet() -> Any:
    torch.manual_seed(0)
    block: Any = BasicBlock
    model = ResNet(block, (2, 1, 1, 1), num_classes=5, channels=(6, 10, 12, 16), stem_width=6)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def test_neurons_of_least_norm_go_and_the_rest_answers_as_with_them_silent() -> None:
    model, silent = _vit(), _vit()
    mlp = silent.blocks[0].mlp
    norm = mlp.fc1.weight.square().sum(1) + mlp.fc1.bias.square() + mlp.fc2.weight.square().sum(0)
    go = norm.argsort()[:24]  # half of 48
    with torch.no_grad():
        mlp.fc2.weight[:, go] = 0
    gv.wrap(model, Prune(parts=["neurons"]))
    assert model.blocks[0].mlp.fc1.weight.shape == (24, 12)
    torch.testing.assert_close(model(X), silent(X), atol=1e-6, rtol=1e-5)


def test_heads_of_least_norm_go_and_the_rest_answers_as_with_them_silent() -> None:
    model, silent = _vit(), _vit()
    attention = silent.blocks[0].attn
    qkv = attention.qkv.weight.view(3, 3, 4, 12)  # of q, k, v: heads of 4
    out = attention.proj.weight.view(12, 3, 4)
    norm = qkv.square().sum((0, 2, 3)) + out.square().sum((0, 2))
    go = norm.argsort()[0]
    with torch.no_grad():
        out[:, go] = 0
    live = gv.wrap(model, Prune(parts=["heads"], ratio=0.3))
    assert model.blocks[0].attn.num_heads == 2
    assert model.blocks[0].attn.qkv.weight.shape == (24, 12)
    torch.testing.assert_close(model(X), silent(X), atol=1e-6, rtol=1e-5)
    assert live.undo().blocks[0].attn.num_heads == 3  # type: ignore[index, union-attr]


def test_channels_that_are_added_up_go_together() -> None:
    """The first stage's channels are those of its shortcut and of both blocks' last convolutions,
    with all that reads them; the inner ones of a block are its own."""
    model, plain = _resnet(), _resnet()
    gv.wrap(model, Prune(parts=["channels"], targets=["layer1.0.conv1"], ratio=0.5))
    inner = model.layer1[0].conv1.weight
    rows = [
        next(i for i, row in enumerate(plain.layer1[0].conv1.weight) if torch.equal(row, one))
        for one in inner
    ]
    assert len(rows) == 3
    assert torch.equal(model.layer1[0].conv2.weight, plain.layer1[0].conv2.weight[:, rows])
    assert torch.equal(model.layer1[0].bn1.running_var, plain.layer1[0].bn1.running_var[rows])
    assert model.layer1[1].conv1.weight.shape == plain.layer1[1].conv1.weight.shape
    with torch.no_grad():  # a network of those channels alone, written by hand
        gone = [i for i in range(6) if i not in rows]
        plain.layer1[0].conv2.weight[:, gone] = 0
    x = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-5)
    together = _resnet()
    gv.wrap(together, Prune(targets=["layer1.1.conv2"]))
    shapes = [together.layer1[i].conv2.out_channels for i in (0, 1)]
    shortcut, reader = together.layer1[0].downsample[0], together.layer2[0].conv1
    assert [shortcut.out_channels, *shapes, reader.in_channels] == [3] * 4


@pytest.mark.parametrize(
    ("count", "ratio", "multiple", "expected"),
    [(7, 0.5, 1, 3), (8, 0.9, 1, 7), (3, 0.99, 1, 2), (10, 0.5, 4, 2), (5, 0.0, 1, 0)],
)
def test_at_least_one_unit_and_a_multiple_stays(
    count: int, ratio: float, multiple: int, expected: int
) -> None:
    assert removed(count, ratio, multiple) == expected


def _pruned(build: Any, **fields: Any) -> Any:
    live = gv.wrap(build(), Prune(**fields))
    return live.merge()


def test_a_smaller_model_is_built_again_from_its_file(tmp_path: Path) -> None:
    model = _pruned(_vit)
    path = tmp_path / "model.safetensors"
    models.save(model, path, ref=REF, options=OPTIONS)
    again: Any = models.build(f"file:{path}").eval()
    assert again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads == 2
    assert torch.equal(again(X), model(X))
    models.save(again, path, ref=REF, options=OPTIONS)  # and again from that
    assert torch.equal(models.build(f"file:{path}").eval()(X), model(X))
    # other classes: a head of its own, all else as in the file
    other: Any = models.build(f"file:{path}", num_classes=7).eval()
    assert other(X).shape == (3, 7)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_a_new_classifier_takes_what_the_smaller_network_gives() -> None:
    model = _pruned(_resnet)
    other: Any = _resnet()
    other.reset_classifier(9)
    weights.load_state(other, full_state_dict(model), head="replace")
    assert other(torch.rand(2, 3, 40, 40)).shape == (2, 9)
    assert other.fc.in_features == other.fc.weight.shape[1] == 8


def test_a_file_that_lies_about_sizes_is_refused_and_nothing_changes() -> None:
    state = full_state_dict(_pruned(_vit))
    name = "blocks.0.mlp.fc1.weight"
    key = f"{ATTACHED}sizes.{name}"
    for bad in (torch.tensor([400, 0]), torch.tensor([-1, 0]), torch.tensor([24])):
        model = _vit()
        before = model(X)
        with pytest.raises(BadInput, match="belong to another model"):
            weights.load_state(model, {**state, key: bad})
        assert torch.equal(model(X), before)
    plain = {n: t for n, t in state.items() if not n.startswith(ATTACHED)}
    with pytest.raises(BadInput, match="do not fit"):  # without what says how small it is
        weights.load_state(_vit(), plain)


RECIPE = """\
name: tiny
data: {name: digits, train: 60, test: 40}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 12, depth: 1, num_heads: 3}
train: {epochs: 1, batch_size: 20, threads: 1, eval_every: 0}
arms:
  large: {}
  small:
    model: {init: "run:large", classifier: keep}
    techniques: [{prune: {ratio: 0.5, widths: [0.5]}}, {distill: {teacher: "run:large"}}]
  smaller: {model: {init: "run:small", classifier: keep}, train: {epochs: 0}}
  taught: {techniques: [{distill: {teacher: "run:small"}}]}
meter: {codecarbon: false}
"""


def test_a_recipe_prunes_distils_and_goes_on_from_the_smaller_one(tmp_path: Path) -> None:
    from greenvis.meters import record

    (tmp_path / "tiny.yaml").write_text(RECIPE)
    gv.run(tmp_path / "tiny.yaml", runs=tmp_path / "runs")
    small, smaller = (
        record.read(next(iter(record.find([tmp_path / "runs" / "tiny" / arm])))).facts
        for arm in ("small", "smaller")
    )
    assert small["pruned"]["stay_of"]["blocks.0.mlp.fc1"] == [24, 48]
    points = [row["setting"] for row in small["operating_points"]]
    assert points == ["width 1", "width 0.5"]
    assert (small["macs"], small["params"]) == (smaller["macs"], smaller["params"])
    assert small["accuracy"] == smaller["accuracy"]


def test_each_width_serves_and_trains_in_its_turn() -> None:
    model = _vit()
    live = gv.wrap(model, Prune(ratio=0.5, parts=["neurons"], widths=[0.5, 0.25]))
    points = live.operating_points()
    assert list(points) == ["width 1", "width 0.5", "width 0.25"]
    full, mlp = model(X), model.blocks[0].mlp
    shapes = {}
    for name, point in live.operating_points().items():
        with point:
            shapes[name] = tuple(mlp.fc1.weight.shape), mlp.fc2.in_features
            narrow = model(X)
        assert torch.equal(narrow, full) == (name == "width 1")
    assert shapes == {
        "width 1": ((24, 12), 24), "width 0.5": ((12, 12), 12), "width 0.25": ((6, 12), 6)
    }  # fmt: skip
    assert torch.equal(model(X), full)
    other = gv.wrap(_vit(), Prune(ratio=0.75, parts=["neurons"]))  # the units that 0.5 of 0.5 is
    with live.operating_points()["width 0.5"]:
        torch.testing.assert_close(model(X), other.model(X))
    model.train()
    reached = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(X).sum().backward()
        gradient: Tensor = mlp.fc1.weight.grad
        assert gradient.shape == (24, 12)
        reached.append(int((gradient.abs().sum(1) > 0).sum()))
        live.step_end()
    assert reached == [24, 12, 6]


def test_a_state_of_other_units_is_refused() -> None:
    live, other = gv.wrap(_vit(), Prune()), _vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.copy_(other.blocks[0].mlp.fc1.weight.flip(0) * 2)
    with pytest.raises(GreenvisError, match="lost other units"):
        gv.wrap(other, Prune()).load_state_dict(live.state_dict())


@pytest.mark.parametrize(
    ("build", "fields", "says"),
    [
        (_resnet, {"parts": ["heads"]}, "cannot lose heads: it has no attention"),
        (_vit, {"parts": ["channels"]}, "cannot lose channels: it has no convolution"),
        (_resnet, {"widths": [0.5]}, "has the statistics of one width"),
        (_vit, {"widths": [1.5]}, "a share between 0 and 1"),
        (_vit, {"targets": ["blocks.0.norm1"]}, "no unit to take out"),
        (_vit, {"ratio": 0.001}, "raise ratio"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)),
            {"input_shape": (3, 2, 2)},
            "nothing to prune",
        ),
    ],
)
def test_refusals(build: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.wrap(build(), Prune(**fields))


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'greenvis\[prune\]'"):
        gv.wrap(_vit(), Prune())
