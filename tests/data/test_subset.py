"""A few images a class in the place of a training set: drawn, herded, condensed; their making is
metered and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import greenvis as gv
from greenvis import data
from greenvis.data import subsets
from greenvis.data.herding import herding
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.meters import pricing, record
from greenvis.planning.plan import plan

RECIPE = """\
name: tiny
data: {name: digits, train: 300, test: 60}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}
train: {epochs: 1, batch_size: 10, threads: 1}
arms:
  all: {}
  random: {subset: {per_class: 3}}
  herding: {subset: {method: herding, per_class: 3}}
  condensed: {subset: {method: condensed, per_class: 3, iterations: 4, width: 8}}
meter: {codecarbon: false}
"""


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load(data.DataSpec(name="digits", train=300, test=60))


def test_matching_loss_is_the_squared_distance_of_the_means() -> None:
    real, made = torch.randn(3, 7, 5), torch.randn(3, 2, 5)
    wanted = sum(
        ((r.sum(0) / 7 - m.sum(0) / 2) ** 2).sum() for r, m in zip(real, made, strict=True)
    )
    assert torch.allclose(subsets.matching_loss(real, made), torch.as_tensor(wanted))
    assert subsets.matching_loss(real, real) == 0


def test_the_embedding_is_convolution_norm_relu_and_pooling() -> None:
    filters = subsets.random_convnet(1, 4, 4, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 4, 4)
    y = F.conv2d(F.pad(x, [1] * 4), filters[0])
    y = (y - y.mean((2, 3), keepdim=True)) / (
        y.var((2, 3), keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    wanted = F.avg_pool2d(y.clamp_min(0), 2).flatten(1)
    assert torch.allclose(subsets.embed(x, filters), wanted, atol=1e-5)
    assert [tuple(f.shape) for f in subsets.random_convnet(3, 16, 8, torch.Generator())] == [
        (8, 3, 3, 3),
        (8, 8, 3, 3),
    ]
    assert [
        len(subsets.random_convnet(1, side, 2, torch.Generator())) for side in (8, 28, 32, 224)
    ] == [1, 3, 3, 6]


def test_the_network_to_train_is_of_the_kind_that_is_matched() -> None:
    for side, width in ((28, 4), (8, 3), (32, 2)):
        net = subsets.convnet(num_classes=5, in_chans=2, img_size=side, width=width).eval()
        x = torch.randn(3, 2, side, side)
        for m in net:
            if isinstance(m, torch.nn.Conv2d):
                torch.nn.init.zeros_(m.bias)
        filters = [m.weight for m in net if isinstance(m, torch.nn.Conv2d)]
        assert torch.allclose(net[:-1](x), subsets.embed(x, filters), atol=1e-4)
        assert net(x).shape == (3, 5)


def test_herding_takes_what_brings_the_mean_nearest() -> None:
    features = torch.tensor([[0.0], [1.0], [4.0], [5.0], [10.0]])  # mean 4
    assert herding(features, 3).tolist() == [
        2,
        3,
        1,
    ]  # 4; (4 + 5) / 2 = 4.5; (4 + 5 + 1) / 3 = 3.33
    assert sorted(herding(features, 9).tolist()) == [0, 1, 2, 3, 4]


def test_condensed_images_match_better_than_those_they_started_from() -> None:
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randn(3, 1, 8, 8, generator=generator)
    y = torch.arange(60) % 3
    x = kinds[y] + 0.3 * torch.randn(60, 1, 8, 8, generator=generator)
    start = torch.randn(3, 2, 1, 8, 8, generator=generator)  # noise, which matches nothing
    made = subsets.condense(x, y, start, iterations=60, lr=10.0, batch=16, width=16, flip=False)
    assert torch.equal(
        made, subsets.condense(x, y, start, iterations=60, lr=10.0, batch=16, width=16, flip=False)
    )
    assert torch.equal(subsets.condense(x, y, start, iterations=0), start)
    filters = subsets.random_convnet(
        1, 8, 16, torch.Generator().manual_seed(9)
    )  # one that was not matched
    means = torch.stack([subsets.embed(x[y == c], filters).mean(0, keepdim=True) for c in range(3)])

    def far(images: torch.Tensor) -> float:
        return subsets.matching_loss(
            means, subsets.embed(images.flatten(0, 1), filters).unflatten(0, (3, 2))
        ).item()

    assert far(made) < 0.5 * far(start)


@pytest.mark.parametrize("method", ["random", "herding", "condensed"])
def test_a_subset_is_a_set_like_the_one_it_stands_for(
    digits: data.Data, method: subsets.Method, tmp_path: Path
) -> None:
    options = {"iterations": 2, "width": 8} if method == "condensed" else {}
    file = tmp_path / "subset.safetensors"
    made = subsets.make(digits.train, method=method, per_class=4, seed=1, file=file, **options)
    assert torch.equal(made.targets, torch.arange(10).repeat_interleave(4))
    assert made.transform == digits.train.transform
    x, _ = made.batch(torch.arange(40))
    ids = set(digits.train.ids.tolist()) & set(made.ids.tolist())
    assert len(ids) == (0 if method == "condensed" else 40)
    again = subsets.make(
        digits.train, method="random", per_class=4, seed=5, file=file
    )  # what was kept, whatever is asked
    assert torch.equal(again.batch(torch.arange(40))[0], x)
    assert again.key() == made.key()
    other = subsets.make(digits.train, method=method, per_class=4, seed=2, **options)
    assert other.key() != made.key() or method == "herding"


def test_too_many_a_class_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("subset: {per_class: 3}", "subset: {per_class: 300}"))
    with pytest.raises(
        BadInput,
        match=r"tiny\.yaml:7: a subset of 300 images a class: class 0 has \d+; ask for fewer",
    ):
        session.run(path, runs=tmp_path / "runs")
    path.write_text(RECIPE.replace("method: herding", "method: hurding"))
    with pytest.raises(
        BadInput, match=r"tiny\.yaml:8: .*'random', 'herding' or 'condensed', not \"hurding\""
    ):
        session.run(path, runs=tmp_path / "runs")


def test_a_recipe_counts_the_making(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    found = plan(path, runs=tmp_path / "runs")
    gv.run(path, runs=tmp_path / "runs")
    runs = {r.header["arm"]: r for r in map(record.read, record.find([tmp_path / "runs"]))}
    assert [
        runs[arm].sum("samples", "train") for arm in ("all", "random", "herding", "condensed")
    ] == [300, 30, 30, 30]
    assert runs["all"].facts["data"]["train"] == 300
    assert (
        runs["herding"].facts["data"]["train"],
        runs["herding"].facts["data"]["chosen_from"],
    ) == (30, 300)
    condensed = runs["condensed"]
    assert condensed.facts["data"]["subset"]["method"] == "condensed"
    flops = condensed.sum("flops", "subset") or 0
    assert (
        flops > 4 * 2 * 10 * (16 + 3 * 3) * 9 * 8 * 64
    )  # four iterations, the first convolutions alone
    assert (pricing.run_energy(condensed, "subset").value or 0) > 0
    assert "subset" not in runs["all"].totals
    assert found["arms"]["tiny/condensed"]["flops"]["value"] > flops
    assert (
        found["arms"]["tiny/random"]["flops"]["value"] < found["arms"]["tiny/all"]["flops"]["value"]
    )
    assert len(list((tmp_path / "runs").rglob("*-subset.safetensors"))) == 3
