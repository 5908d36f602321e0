"""A recipe's frontier: the plain arms it stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.experiment.recipe import load_recipe

RECIPE = """\
name: small
data: {name: digits, train: 60, test: 60}
model: {ref: plain/mlp, hidden: [8], img_size: 8}
train: {epochs: 4, batch_size: 20, lr: 3.0e-3, threads: 1, eval_every: 0, seeds: [0, 1]}
frontier: {epochs: [1, 8], img_sizes: [4]}
arms:
  full: {}
  smoothed: {techniques: [ema]}
report: {baseline: full}
"""


def _written(folder: Path, old: str = "", new: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new) if old else RECIPE)
    return path


def test_a_frontier_stands_for_the_combinations_that_are_not_the_arm_itself(tmp_path: Path) -> None:
    recipe = load_recipe(_written(tmp_path))
    rungs = {"plain-1ep", "plain-8ep", "plain-4px-4ep", "plain-4px-1ep", "plain-4px-8ep"}
    assert set(recipe.arms) == {"full", "smoothed", *rungs}
    small = recipe.arm("plain-4px-1ep")
    assert (small.train.epochs, small.data.img_size, small.techniques) == (1, 4, ())
    assert small.train.lr == recipe.arm("full").train.lr
    assert recipe.arm("plain-8ep").data == recipe.arm("full").data


def test_other_networks_are_rungs_and_epochs_have_a_default(tmp_path: Path) -> None:
    new = "{models: [timm/resnet10t, {ref: plain/mlp, hidden: [4]}]}"
    recipe = load_recipe(_written(tmp_path, "{epochs: [1, 8], img_sizes: [4]}", new))
    assert {a for a in recipe.arms if a.startswith("plain-resnet10t")} == {
        f"plain-resnet10t-{n}ep" for n in (1, 2, 4, 8)
    }
    assert recipe.arm("plain-resnet10t-2ep").model.options == {}
    assert recipe.arm("plain-mlp-2ep").model.options["hidden"] == [4]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{epochs: [1, 8]", "{arm: smoothed, epochs: [1, 8]", "a frontier is of plain training"),
        ("{epochs: [1, 8]", "{arm: other, epochs: [1, 8]", "'other' is no arm"),
        ("  full: {}", "  full: {}\n  plain-1ep: {}", "a second arm is named 'plain-1ep'"),
        ("[1, 8]", str(list(range(1, 70))), "at most 64"),
    ],
)
def test_a_frontier_that_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_recipe(_written(tmp_path, old, new))
    assert "recipe.yaml:5" in str(caught.value)


def test_a_recipe_with_a_frontier_reports_each_arm_against_it(tmp_path: Path) -> None:
    path = _written(tmp_path, ", img_sizes: [4]")
    records = gv.run(path, runs=tmp_path / "runs")
    page = gv.report(records, out=tmp_path / "report")
    text = (page.parent / "report.md").read_text()
    section = text.partition("## Against the frontier of plain training")[2].partition("\n## ")[0]
    assert "| smoothed |" in section
    assert "| full |" not in section
    assert "All 3 plain arms took" in section
