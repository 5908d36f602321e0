"""Labels bought in rounds: what a round may see, what it costs, and where a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import greenvis as gv
from greenvis import data
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import checkpoint, jobs, rounds, session
from greenvis.experiment.recipe import load_recipe
from greenvis.meters import record
from greenvis.meters.labels import counts
from greenvis.planning.plan import plan
from greenvis.report import label_curve, report, results

ROUNDS = {"start": 8, "step": 6, "rounds": 3}  # the last batch of each round is another
LABELS = [8, 14, 20]


def _recipe(folder: Path, arms: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "name": "tiny",
        "data": {"name": "digits", "train": 120, "test": 60, **changes.pop("data", {})},
        "model": {"ref": "plain/mlp", "hidden": [16], "img_size": 8},
        "train": {"epochs": 3, "batch_size": 5, "lr": 1e-2, **changes.pop("train", {})},
        "arms": arms,
        "meter": {"codecarbon": False},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _arm(**settings: Any) -> dict[str, Any]:
    return {"active": {**ROUNDS, **settings}}


def _run(folder: Path, arms: dict[str, Any], **changes: Any) -> None:
    session.run(_recipe(folder, arms, **changes), runs=folder / "runs")


def _weights(folder: Path, arm: str) -> dict[str, Tensor]:
    return load_file(folder / "runs/tiny" / arm / "seed0/model.safetensors")


def _bought(folder: Path, arm: str) -> list[list[int]]:
    (file,) = (folder / "runs/tiny" / arm / "seed0").glob("*" + jobs.ROUNDS_FILE)
    return json.loads(file.read_text())["rounds"]


def _records(folder: Path, arm: str) -> list[record.Run]:
    return [record.read(file) for file in record.find([folder / "runs/tiny" / arm])]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


ARMS = {
    "once": {"active": {"query": "random", "start": 20, "rounds": 1}},
    "random": _arm(query="random"),
    "badge": _arm(query="badge"),
    "warm": _arm(query="badge", retrain="warm"),
    "typiclust": _arm(query="typiclust", features="run:once"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("active")
    _run(folder, ARMS)
    return folder


def test_the_record_holds_each_rounds_labels_accuracy_and_cost(finished: Path) -> None:
    (run,) = _records(finished, "badge")
    assert [row["labels"] for row in run.facts["active"]["bought"]] == LABELS
    assert run.facts["active"]["bought"][-1]["accuracy"] == run.facts["accuracy"]
    observed = run.facts["task_observed"]
    assert len(observed) == 3
    assert all(one["to_s"] > one["from_s"] for one in observed)
    lines = [(x["kind"], x["count"], x["why"], x["name"]) for x in run.labels]
    assert lines == [
        ("class", 8, "bought", "round 1"),
        ("class", 6, "bought", "round 2"),
        ("class", 6, "bought", "round 3"),
    ]
    spent = counts(run.labels, run.images)
    assert spent is not None
    assert spent.images == {"labelled": 20, "unlabelled": 100}
    # all that was trained and looked at is charged
    assert run.sum("samples", "train") == 3 * sum(LABELS) + 2 * 120
    assert (run.facts["data"]["train"], run.facts["data"]["chosen_from"]) == (20, 120)
    bought = _bought(finished, "badge")
    assert [len(own) for own in bought] == [8, 6, 6]
    assert len({row for own in bought for row in own}) == 20


def test_rounds_from_scratch_end_as_one_training_on_all_their_labels(finished: Path) -> None:
    drawn = [row for own in _bought(finished, "random") for row in own]
    assert drawn == _bought(finished, "once")[0]
    assert _same(_weights(finished, "random"), _weights(finished, "once"))
    assert not _same(_weights(finished, "badge"), _weights(finished, "warm"))
    assert _bought(finished, "badge")[:2] == _bought(finished, "warm")[:2]


def test_features_of_another_run_choose_the_first_round_too_and_are_charged(finished: Path) -> None:
    first = _bought(finished, "typiclust")[0]
    assert first != _bought(finished, "random")[0]
    (run,) = _records(finished, "typiclust")
    assert [(u["role"], u["name"]) for u in run.uses] == [("features", "tiny/once")]
    assert run.sum("samples", "train") == 3 * sum(LABELS) + 120  # the pool is looked at once


def test_a_report_shows_the_rounds_and_takes_random_ones_for_its_label_curve(
    finished: Path, tmp_path: Path
) -> None:
    content = results(finished / "runs")
    for arm in ("badge", "random"):
        each = content.arms[arm].label_rounds
        assert [one.labels for one in each] == LABELS
        assert each[-1].gain.mean == content.arms[arm].gain.mean
        spent = content.arms[arm].train_energy_j.value
        assert spent is not None
        assert 0 < sum(one.energy_j["0"] for one in each) < spent
    assert content.arms["warm"].query == "badge, warm"
    assert {*label_curve.label_only(content)} == {"once", "random"}
    # 20 labels of `once`, 8 and 14 of the rounds of `random`
    assert "have 3 budget(s)" in label_curve.worth(content, "badge").why
    text = (report(finished / "runs", out=tmp_path).parent / "report.md").read_text()
    assert "| Arm | Query | 8 labels | 14 labels | 20 labels |" in text


def _planted(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    """Give these images of the pool another class."""
    real = jobs.Jobs.images

    def images(self: jobs.Jobs, *args: Any) -> data.Data:
        own = real(self, *args)
        labels = own.train.targets.clone()
        labels[rows] = (labels[rows] + 1) % 10
        return replace(own, train=own.train.relabeled(labels))

    monkeypatch.setattr(jobs.Jobs, "images", images)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arm", ["badge", "typiclust"])
def test_the_label_of_an_image_that_was_not_bought_changes_nothing(
    arm: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bought = {row for name in (arm, "once") for own in _bought(finished, name) for row in own}
    _planted(monkeypatch, [row for row in range(120) if row not in bought])
    _run(tmp_path, {name: ARMS[name] for name in ("once", arm)})
    assert _bought(tmp_path, arm) == _bought(finished, arm)
    assert _same(_weights(tmp_path, arm), _weights(finished, arm))


def test_the_label_of_one_that_was_bought_changes_the_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planted(monkeypatch, _bought(finished, "badge")[0][:1])
    _run(tmp_path, {"badge": ARMS["badge"]})
    assert not _same(_weights(tmp_path, "badge"), _weights(finished, "badge"))


class Killed(BaseException):
    pass


def _killed_at_step(monkeypatch: pytest.MonkeyPatch, part: int, batch: int) -> None:
    real = checkpoint.save

    def save(path: Path, *args: Any) -> None:
        real(path, *args)
        if (args[-1].part, args[-1].epoch, args[-1].batch) == (part, 1, batch):
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save)


def _killed_after_choice(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = rounds.Purchases.buy

    def buy(self: rounds.Purchases, at: int, live: Any) -> Any:
        out = real(self, at, live)
        if at == number and self.file is not None:
            raise Killed
        return out

    monkeypatch.setattr(rounds.Purchases, "buy", buy)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("moment", ["in round 2", "after the choice of round 3"])
def test_killed_it_goes_on_to_the_same_labels_and_weights(
    moment: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"badge": ARMS["badge"]}
    path = _recipe(tmp_path, arms, train={"checkpoint_every_s": 1e-9})
    with monkeypatch.context() as patched:
        if moment == "in round 2":
            _killed_at_step(patched, 1, 2)
        else:
            _killed_after_choice(patched, 2)
        with pytest.raises(Killed):
            session.run(path, runs=tmp_path / "runs")
    session.run(path, runs=tmp_path / "runs")
    assert _bought(tmp_path, "badge") == _bought(finished, "badge")
    assert _same(_weights(tmp_path, "badge"), _weights(finished, "badge"))
    (whole,) = _records(finished, "badge")
    attempts = _records(tmp_path, "badge")
    assert len(attempts) == 2
    last = max(attempts, key=lambda run: run.header["attempt"])
    assert last.facts["active"] == whole.facts["active"]
    spent = counts([x for r in attempts for x in r.labels], [])
    assert spent is not None
    assert spent.labels == {("class", "bought"): 20}


def test_a_damaged_file_of_rounds_is_refused(finished: Path, tmp_path: Path) -> None:
    arms = {"badge": ARMS["badge"]}
    path = _recipe(tmp_path, arms)
    (job,) = jobs.Jobs(tmp_path / "runs").of(load_recipe(path))
    job.folder.mkdir(parents=True)
    file = job.folder / f"{job.inputs}-{jobs.ROUNDS_FILE}"
    for text in ("{", '{"rounds": [[0, 0, 1, 2, 3, 4, 5, 6]]}', '{"rounds": [[500]]}'):
        file.write_text(text)
        with pytest.raises(GreenvisError, match="remove it to start this arm again"):
            session.run(path, runs=tmp_path / "runs")


def test_what_knows_no_rounds_is_refused(tmp_path: Path) -> None:
    for beside, words in (
        ({"data": {"labels": 30}}, r"tiny.yaml:\d+: .*active or data.labels.*labels: null"),
        ({"subset": {"per_class": 2}}, "active or subset"),
        ({"stages": [{"layers": ["head"]}]}, "active or stages"),
        ({"train": {"target": 0.5}}, r"active or train\.target"),
    ):
        with pytest.raises(BadInput, match=words):
            load_recipe(_recipe(tmp_path, {"a": {**_arm(), **beside}})).arm("a")
    for settings, words in (
        ({"query": "bald"}, "query"),
        ({"rounds": 1}, "step and retrain are of further rounds"),
        ({"query": "entropy", "features": "run:once"}, "features"),
        ({"start": 0}, "start"),
    ):
        with pytest.raises(BadInput, match=words):
            load_recipe(_recipe(tmp_path, {"a": _arm(**settings)}))
    pretext = {**_arm(), "techniques": [{"simclr": {"dim": 8}}]}
    for arm, words in ((_arm(start=200), "but there are 120"), (pretext, "a pretext learns")):
        with pytest.raises(BadInput, match=words):
            gv.run(_recipe(tmp_path, {"a": arm}), runs=tmp_path / "runs")
    assert not (tmp_path / "runs/tiny/a").exists()


def test_an_arm_may_leave_the_recipes_budget(tmp_path: Path) -> None:
    arm = {**_arm(), "data": {"labels": None}}
    recipe = load_recipe(_recipe(tmp_path, {"few": {}, "a": arm}, data={"labels": 30}))
    assert recipe.arm("a").data.labels is None


def test_a_plan_counts_every_round(finished: Path, tmp_path: Path) -> None:
    planned = plan(_recipe(tmp_path, {"random": ARMS["random"]}), runs=tmp_path / "runs")
    (run,) = _records(finished, "random")
    flops = planned["arms"]["tiny/random"]["flops"]
    spent = (run.sum("flops", "train") or 0.0) + (run.sum("flops", "eval") or 0.0)
    assert flops["value"] == pytest.approx(spent, rel=0.25)
