"""Split Fashion-MNIST, class-incremental, against reference rules run in miniature: mean ± 3
standard deviations, or above."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenvis.experiment import session
from greenvis.meters import record
from greenvis.tasks import continual as cl_metrics

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "miniature_reference.json").read_text()
)["split_fmnist"]["rows"]
RECIPE = Path(__file__).parents[2] / "recipes/continual/split-fashion.yaml"
ARMS: dict[str, dict[str, Any]] = {
    "finetune": {"method": "none", "lr": 0.03},
    "ewc": {"method": "ewc"},
    "lwf": {"method": "lwf"},
    "er-200": {"method": "er", "buffer": 200, "replay_minibatch": 128},
    "er-500": {"method": "er", "buffer": 500},
    "er-1000": {"method": "er", "buffer": 1000, "lr": 0.03},
    "er-2000": {"method": "er", "buffer": 2000},
    "derpp-200": {"method": "derpp", "buffer": 200},
    "derpp-500": {"method": "derpp", "buffer": 500},
    "joint": {"method": "joint"},
}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["finetune", "er-500", "derpp-500"])
def test_one_seed_lies_within_the_reference(tmp_path: Path, arm: str) -> None:
    session.run(_only(tmp_path, arm), runs=tmp_path / "runs", overrides=["train.seeds=[0]"])
    (run,) = [record.read(path) for path in record.find([tmp_path / "runs"])]
    (row,) = [r for r in REFERENCE if all(r[k] == v for k, v in ARMS[arm].items())]
    its = row["final_class_il"]
    accuracy = 100 * run.facts["accuracy"]
    assert accuracy > its["mean"] - 3 * max(
        its["std"], 0.3
    )  # below one test image in a thousand no spread is known
    forgotten = cl_metrics.forgetting(run.facts["task_accuracy"])
    assert forgotten is not None
    assert 100 * forgotten < row["forgetting_max"]["mean"] + 3 * max(
        row["forgetting_max"]["std"], 0.3
    )
    assert 100 * (cl_metrics.average_accuracy(run.facts["task_accuracy_known"]) or 0) > 60


def _only(folder: Path, arm: str) -> Path:
    """The recipe with one arm, which is then its baseline."""
    import yaml

    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["arms"] = {arm: recipe["arms"][arm]}
    recipe.pop("report")
    path = folder / "one.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_recipe_has_the_protocol_of_the_reference() -> None:
    """Every setting of the table is an arm, with its learning rate, buffer and weights."""
    from greenvis.experiment.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    for name, settings in ARMS.items():
        (row,) = [r for r in REFERENCE if all(r[k] == v for k, v in settings.items())]
        arm = recipe.arm(name)
        assert (arm.train.lr, arm.train.batch_size, arm.train.epochs, arm.train.momentum) == (
            row["lr"],
            10,
            1,
            0,
        )
        for technique in arm.techniques:
            form = technique.model_dump()
            if row["buffer"]:
                assert (form["size"], form["batch_size"]) == (
                    row["buffer"],
                    row["replay_minibatch"],
                )
            if row["method"] == "derpp":
                assert (form["alpha"], form["beta"]) == (row["alpha"], row["beta"])
    assert recipe.data.stream is not None
    assert (recipe.data.stream.tasks, recipe.data.stream.order, recipe.data.normalise) == (
        5,
        "given",
        False,
    )
