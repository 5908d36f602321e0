"""`greenvis plan`: what it predicts is what is then spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from greenvis.errors import BadInput
from greenvis.experiment import loop as train
from greenvis.experiment import session
from greenvis.meters import record
from greenvis.planning.plan import plan

RECIPE = """\
name: planned
data: {name: digits, train: 240, test: 100}
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
    assert all(arm["done"] == 0 for arm in found["arms"].values())
    assert (
        found["arms"]["planned/student"]["each"]["flops"]["value"]
        > found["arms"]["planned/plain"]["each"]["flops"]["value"]
    )

    session.run(path, runs=tmp_path / "runs")
    for file in record.find([tmp_path / "runs"]):
        run = record.read(file)
        predicted = run.facts["predicted"]
        assert predicted == found["arms"][f"planned/{run.header['arm']}"]["each"]
        assert predicted["flops"]["low"] <= run.sum("flops", "train") <= predicted["flops"]["high"]
        spent = (run.sum("cpu_s", "train") or 0) + (run.sum("cpu_s", "eval") or 0)
        assert "energy_j" not in predicted, (
            "observations, which the report prices like what was spent"
        )
        assert 0.3 < spent / predicted["cpu_s"]["value"] < 3.0

    again = plan(path, runs=tmp_path / "runs")
    assert {name: (arm["runs"], arm["done"]) for name, arm in again["arms"].items()} == {
        "planned/plain": (0, 2),
        "planned/teacher": (0, 1),
        "planned/student": (0, 2),
    }
    assert all(
        figure == {"value": 0.0, "low": 0.0, "high": 0.0} for figure in again["total"].values()
    )
    assert all(arm["each"] == found["arms"][name]["each"] for name, arm in again["arms"].items())
    more = plan(path, runs=tmp_path / "runs", overrides=["train.seeds=[0, 1, 2]"])
    assert {name: (arm["runs"], arm["done"]) for name, arm in more["arms"].items()} == {
        "planned/plain": (1, 2),
        "planned/teacher": (0, 1),
        "planned/student": (1, 2),
    }
    each = more["arms"]["planned/plain"]["each"]["flops"]["value"]
    assert more["arms"]["planned/plain"]["flops"]["value"] == pytest.approx(each)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "arms",
    [
        "plain: {}",
        "plain: {subset: {method: random, per_class: 20}}",
        "plain: {stages: [{train: {epochs: 1}}, {train: {epochs: 2}}]}",
    ],
)
def test_what_an_interrupted_run_has_done_is_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: str
) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(
        RECIPE.split("arms:")[0].replace("[0, 1]", "[0]")
        + f"arms:\n  {arms}\nmeter: {{codecarbon: false}}\n"
    )
    whole = plan(path, runs=tmp_path / "runs")["arms"]["planned/plain"]

    def save(loop: train.Loop, real=train.Loop.save) -> None:
        real(loop)
        if loop.file is not None:  # else it warms up
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Loop, "save", save)
        with pytest.raises(KeyboardInterrupt):
            session.run(path, runs=tmp_path / "runs")
    rest = plan(path, runs=tmp_path / "runs")["arms"]["planned/plain"]
    assert (rest["runs"], rest["done"]) == (1, 0)
    assert rest["flops"]["value"] / rest["each"]["flops"]["value"] == pytest.approx(2 / 3, rel=0.02)
    assert rest["each"]["flops"]["value"] == pytest.approx(
        whole["each"]["flops"]["value"], rel=0.02
    )


def test_a_plan_of_other_inputs_is_not_claimed(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE.split("  teacher:")[0] + "meter: {codecarbon: false}\n")
    plan(path, runs=tmp_path / "runs", overrides=["train.lr=0.5", "train.seeds=[0]"])
    session.run(path, runs=tmp_path / "runs", overrides=["train.seeds=[0]", "train.epochs=1"])
    assert all(record.read(f).facts["predicted"] is None for f in record.find([tmp_path / "runs"]))
    assert json.loads((tmp_path / "runs/planned/plan.json").read_text())["arms"]


def test_what_goes_by_images_held_out_is_planned(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(
        RECIPE.split("arms:")[0].replace("test: 100", "test: 60, held_out: 40")
        + "arms: {swad: {techniques: [swad]}}\nmeter: {codecarbon: false}\n"
    )
    assert plan(path, runs=tmp_path / "runs")["arms"]["planned/swad"]["runs"] == 2


def test_a_plan_checks_like_a_run(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE.replace("name: digits", "name: digitz"))
    with pytest.raises(BadInput, match="did you mean 'digits'"):
        plan(path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
