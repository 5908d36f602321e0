"""Ranking bases: scores of real models on real images, what is on record of fine-tuning them, and
what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenvis.cli import main as cli
from greenvis.errors import BadInput
from greenvis.experiment.session import run
from greenvis.meters import record
from greenvis.planning.rank import METHODS, correlation, rank, weights_of

HEAD = "meter: {codecarbon: false}\ntrain: {epochs: 1, batch_size: 20, threads: 1, eval_every: 0}\n"
MODEL = (
    "model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, "
    "num_heads: 1}\n"
)
BASES = "name: bases\ndata: {name: digits, classes: [0, 1, 2], train: 60, test: 30}\n"
TUNED = "name: tuned\ndata: {name: digits, classes: [3, 4, 5], train: 60, test: 30}\n"
NAMES = ("random", "once", "more")
SEEDS = {"random": [0], "once": [0, 1], "more": [0]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bases, each fine-tuned on other classes; one of them with a technique, too."""
    folder = tmp_path_factory.mktemp("ranked")
    arms = ", ".join(
        f"{name}: {{train: {{epochs: {epochs}}}}}"
        for name, epochs in zip(NAMES, (0, 1, 3), strict=True)
    )
    (folder / "bases.yaml").write_text(f"{BASES}{MODEL}{HEAD}arms: {{{arms}}}\n")
    own = "\n".join(
        f"  {n}: {{model: {{init: 'run:bases/{n}'}}, train: {{seeds: {SEEDS[n]}}}}}" for n in NAMES
    )
    probe = "  probe: {model: {init: 'run:bases/more'}, techniques: [linear_probe]}"
    (folder / "tuned.yaml").write_text(f"{TUNED}{MODEL}{HEAD}arms:\n{own}\n{probe}\n")
    run(folder / "tuned.yaml", runs=folder / "runs")
    return folder


def test_ranks_what_recipes_left_and_checks_itself_on_record(runs: Path) -> None:
    bases = [f"run:bases/{name}" for name in NAMES]
    found = rank(bases, str(runs / "tuned.yaml"), images=40, by="sfda", runs=runs / "runs")
    rows = {row["base"]: row for row in found["rows"]}
    assert sorted(rows) == sorted(bases)
    assert [row["rank"] for row in found["rows"]] == [1, 2, 3]
    assert [row["sfda"] for row in found["rows"]] == sorted(
        (row["sfda"] for row in rows.values()), reverse=True
    )
    assert found["images"] == 40
    for name in NAMES:
        row, left = rows[f"run:bases/{name}"], record.find([runs / "runs/tuned" / name])
        accuracies = [record.read(path).facts["accuracy"] for path in left]
        assert len(accuracies) == len(SEEDS[name])
        assert row["tuned_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
        assert row["dim"] == 8
        assert row["energy_j"] > 0
    spent = record.read(found["record"])
    assert spent.status == "done"
    assert spent.sum("samples", "base2/features") == 40
    assert sum(row["energy_j"] for row in rows.values()) <= found["energy_j"]["value"] * 1.001
    assert found["tuning_energy_j"] == pytest.approx(
        sum(row["tuning_energy_j"] for row in rows.values())
    )
    assert set(found["correlation"] or {}) == set(METHODS)


def test_the_command_says_the_same_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "rank",
        "run:bases/once",
        "run:bases/more",
        "--data",
        "digits",
        "--images",
        "40",
        "--runs",
        str(runs / "runs"),
    ]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "run:bases/more" in shown.replace("\n", "")
    assert "fewer than three" in shown
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correlation"] is None
    assert "tuned_accuracy" not in found["rows"][0]  # of three classes, not of all ten


def test_takes_a_library_s_models_beside(runs: Path) -> None:
    left = runs / "runs/bases/more/seed0"
    weights = weights_of("run:bases/more", runs / "runs")
    assert weights == left / "model.safetensors"
    found = rank(
        ["timm/vit_tiny_patch16_224", f"file:{weights}"], "digits", images=40, runs=runs / "runs",
        img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=1,
    )  # fmt: skip
    tuned = rank(
        [str(left), "run:bases/once"], str(runs / "tuned.yaml"), images=40, runs=runs / "runs"
    )
    assert all("tuned_accuracy" in row for row in tuned["rows"])
    assert {row["base"]: row["dim"] for row in found["rows"]} == {
        "timm/vit_tiny_patch16_224": 12,
        f"file:{weights}": 8,
    }


@pytest.mark.parametrize("task", ["segmentation", "generation", "bags"])
def test_bases_for_another_task_are_not_ranked(tmp_path: Path, task: str) -> None:
    data = (
        "{name: digits, bags: {size: 4, positive: ['1']}}" if task == "bags" else "{name: digits}"
    )
    (tmp_path / "task.yaml").write_text(
        f"name: t\ntask: {task}\ndata: {data}\nmodel: {{ref: plain/mlp}}\narms: {{a: {{}}}}\n"
    )
    with pytest.raises(BadInput, match=f"is of task '{task}'.*do not order bases for its"):
        rank(["plain/mlp", "plain/cnn"], str(tmp_path / "task.yaml"), runs=tmp_path / "runs")


def test_correlation_is_of_ranks() -> None:
    rows: list[dict[str, Any]] = [
        {"tuned_accuracy": a, **dict.fromkeys(METHODS, s)}
        for a, s in [(0.1, -3.0), (0.5, 2.0), (0.9, 100.0)]
    ]
    found = correlation(rows)
    assert found is not None
    assert found["logme"] == {
        "weighted_tau": pytest.approx(1.0),
        "tau": pytest.approx(1.0),
        "bases": 3,
    }
    rows[0]["ped"], rows[2]["ped"] = 100.0, -3.0
    assert (correlation(rows) or {})["ped"]["tau"] == pytest.approx(-1.0)
    assert correlation(rows[:2]) is None


@pytest.mark.parametrize(
    ("bases", "more", "says"),
    [
        (["run:bases/more"], {}, "two bases or more"),
        (["run:bases/more", "run:bases/mor"], {}, "did you mean 'run:bases/more'"),
        (["run:bases/more", "run:bases/more", "run:bases/once"], {}, "listed twice"),
        (["run:bases/more", "run:bases/once"], {"by": "logm"}, "did you mean 'logme'"),
        (["run:bases/more", "run:bases/once"], {"data_name": "digit"}, "unknown data set 'digit'"),
    ],
)
def test_refuses_before_anything_is_spent(
    runs: Path, bases: list[str], more: dict[str, str], says: str
) -> None:
    before = len(list(record.find([runs / "runs"])))
    with pytest.raises(BadInput, match=says):
        rank(bases, **{"data_name": "digits", **more}, runs=runs / "runs")  # type: ignore[arg-type]
    assert len(list(record.find([runs / "runs"]))) == before
