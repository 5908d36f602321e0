"""Weights averaged over runs: the mean they are, what it began as, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.meters import pricing, record
from greenvis.models import averaging

RECIPE = """\
name: soup
data: {name: digits, train: 60, test: 40}
model: {ref: timm/resnet18, img_size: 8, in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], stem_width: 4}
train: {epochs: 1, batch_size: 30, lr: 1.0e-2, threads: 1, eval_every: 0}
arms:
  base: {}
  a: {model: {init: "run:base", classifier: keep}}
  b: {model: {init: "run:base", classifier: keep}, data: {augment: crop}}
  mean: {model: {average: ["run:a", "run:b"], classifier: keep}, train: {epochs: 0}}
  estimated:
    model: {average: ["run:a", "run:b"], average_norms: estimate, classifier: keep}
    train: {epochs: 0}
meter: {codecarbon: false}
"""


def _write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "soup.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    gv.run(_write(folder), runs=folder / "runs")
    return folder / "runs" / "soup"


def _weights(finished: Path, arm: str) -> dict[str, Tensor]:
    return load_file(finished / arm / "seed0" / "model.safetensors")


def test_an_arm_begins_with_the_mean_of_others(finished: Path) -> None:
    a, b, got = (_weights(finished, arm) for arm in ("a", "b", "mean"))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name, value in got.items():
        expected = torch.maximum(a[name], b[name])
        if value.is_floating_point():
            expected = (a[name] + b[name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_norms_get_the_statistics_of_the_training_images(finished: Path) -> None:
    mean, estimated = (_weights(finished, arm) for arm in ("mean", "estimated"))
    apart = [name for name in mean if not torch.equal(mean[name], estimated[name])]
    assert apart
    assert all(name.rpartition(".")[2].startswith(("running_", "num_")) for name in apart)
    recipe = gv.load_recipe(finished.parents[1] / "soup.yaml")
    planned = session.Session(finished.parent, False, (), lambda text: None)
    job = next(job for job in planned.plan(recipe) if job.arm.name == "mean")
    prepared = planned.prepare(job)
    x = torch.cat([x for x, _ in gv.data.batches(prepared.images.train, 60)])
    stem = prepared.build().conv1(x)
    torch.testing.assert_close(
        estimated["bn1.running_mean"], stem.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5
    )


def test_all_it_was_made_from_is_charged_once(finished: Path) -> None:
    (path,) = record.find([finished / "mean"])
    run = record.read(path)
    assert run.facts["model"]["average"] == ["run:a", "run:b"]
    uses = {use["name"]: use for use in pricing.uses(run)}
    assert {name: use["role"] for name, use in uses.items()} == dict.fromkeys(
        ("soup/a", "soup/b", "soup/base"), "base"
    )
    assert sorted(uses["soup/base"]["of"]) == ["soup/a seed 0", "soup/b seed 0"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('average: ["run:a", "run:b"]', 'average: ["run:a"]', "two or more"),
        ('average: ["run:a", "run:b"]', 'average: ["run:a", "b"]', "neither run:NAME"),
        ('average: ["run:a", "run:b"]', 'average: ["run:a", "run:c"]', "neither an arm"),
        ('average: ["run:a", "run:b"]', 'init: "run:a", average: ["run:a", "run:b"]', "not from"),
        ('init: "run:base", ', "average_norms: estimate, ", "changes nothing"),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.run(_write(tmp_path, RECIPE.replace(old, new, 1)), runs=tmp_path / "runs")


def test_models_of_other_structure_are_refused() -> None:
    one = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(BadInput, match=r"two and one are of other structures: 'b'"):
        averaging.mean({"one": one, "two": {"a": torch.ones(2), "b": torch.ones(4)}})
    dilated = {"a": torch.ones(2), "greenvis.kept.settings.c.dilation": torch.tensor([2, 2])}
    other = {**dilated, "greenvis.kept.settings.c.dilation": torch.tensor([3, 3])}
    with pytest.raises(BadInput, match="other structures"):
        averaging.mean({"one": dilated, "two": other})
