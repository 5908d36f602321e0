"""`greenvis plan`: what it predicts is what is then spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from greenvis import experiment, record
from greenvis.errors import BadInput
from greenvis.plan import plan

RECIPE = """\
name: planned
data: {name: digits, train: 320, test: 100}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {epochs: 3, batch_size: 20, seeds: [0, 1], threads: 1}
arms:
  plain: {}
  teacher: {model: {embed_dim: 32}, train: {seeds: [0]}}
  student: {techniques: [{distill: {teacher: "run:teacher"}}]}
meter: {codecarbon: false}
"""


def test_prediction_and_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE)
    found = plan(path, runs=tmp_path / "runs")
    assert {name: arm["runs"] for name, arm in found["arms"].items()} == {
        "planned/plain": 2,
        "planned/teacher": 1,
        "planned/student": 2,
    }
    assert not list(record.find([tmp_path / "runs"])), "a plan is no run"
    for figure in found["total"].values():
        assert 0 < figure["low"] < figure["value"] < figure["high"]
    assert found["arms"]["planned/student"]["each"]["flops"]["value"] > found["arms"]["planned/plain"]["each"]["flops"]["value"]

    experiment.run(path, runs=tmp_path / "runs")
    for file in record.find([tmp_path / "runs"]):
        run = record.read(file)
        predicted = run.facts["predicted"]
        assert predicted == found["arms"][f"planned/{run.header['arm']}"]["each"]
        assert predicted["flops"]["low"] <= run.sum("flops", "train") <= predicted["flops"]["high"]
        spent = (run.sum("cpu_s", "train") or 0) + (run.sum("cpu_s", "eval") or 0)
        seconds = predicted["energy_j"]["value"] / 4.0  # watts of a busy CPU, the central coefficient; RAM is little
        assert 0.3 < spent / seconds < 3.0


def test_a_plan_of_other_inputs_is_not_claimed(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE)
    plan(path, runs=tmp_path / "runs", overrides=["train.lr=0.5", "train.seeds=[0]"])
    experiment.run(path, runs=tmp_path / "runs", overrides=["train.seeds=[0]", "train.epochs=1"])
    assert all(record.read(f).facts["predicted"] is None for f in record.find([tmp_path / "runs"]))
    assert json.loads((tmp_path / "runs/planned/plan.json").read_text())["arms"]


def test_a_plan_checks_like_a_run(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE.replace("name: digits", "name: digitz"))
    with pytest.raises(BadInput, match="did you mean 'digits'"):
        plan(path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
