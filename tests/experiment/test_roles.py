"""Recipes that give images roles, and leaks planted between them, each of which is caught."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load_file

import greenvis as gv
from greenvis import data
from greenvis.data import DataSet, ImageSet, Split, Stored, dataset, draws, loading
from greenvis.data.splits import Lazy
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment.jobs import Jobs
from greenvis.experiment.recipe import load_recipe
from greenvis.experiment.session import Session
from greenvis.meters import record
from greenvis.meters.labels import counts
from greenvis.testing import check_dataset

RECIPES = Path(__file__).parents[2] / "recipes"
# of recipes made before images had roles: what their finished runs are known by
DIGESTS = {
    "quickstart-base.yaml": "edf49590ac73d06d",
    "continual/split-digits.yaml": "f15e423d560eb4a7",
}


def _recipe(folder: Path, **changes: Any) -> Path:
    recipe = {
        "name": "tiny",
        "data": {"name": "digits", "train": 120, "test": 60, **changes.pop("data", {})},
        "model": {"ref": "plain/mlp", "hidden": [16], "img_size": 8},
        "train": {"epochs": 1, "batch_size": 40, "eval_every": 0},
        "arms": changes.pop("arms", {"plain": {}}),
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _records(path: Path, runs: Path) -> dict[str, record.Run]:
    folder = gv.run(path, runs=runs)
    found = [record.read(file) for file in record.find([folder])]
    return {str(run.header["arm"]): run for run in found}


def _digest(name: str) -> str:
    jobs = Jobs(Path("none")).of(load_recipe(RECIPES / name))
    text = json.dumps([(job.name, job.seed, job.inputs) for job in jobs])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", list(DIGESTS))
def test_recipes_without_roles_keep_their_digests(name: str) -> None:
    assert _digest(name) == DIGESTS[name]


def test_an_arm_has_budgets_of_its_own_and_records_what_it_took(tmp_path: Path) -> None:
    arms = {
        "few": {"data": {"labels": 20}},
        "noisy": {"data": {"labels": 60, "noise": 0.5, "augment": "crop"}},
        "all": {},
    }
    shared = {"held_out": 30, "domains": {"test": ["plain", "invert"]}}
    found = _records(_recipe(tmp_path, arms=arms, data=shared), tmp_path / "runs")
    facts = {arm: run.facts["data"] for arm, run in found.items()}
    assert {arm: f["train"] for arm, f in facts.items()} == {"few": 20, "noisy": 60, "all": 120}
    assert len({json.dumps(f["tests"]) for f in facts.values()}) == 1
    assert found["noisy"].facts["noise"] == {"wrong": 30, "of": 60}
    for arm, run in found.items():
        spent = counts(run.labels, run.images)
        assert spent is not None
        assert spent.labels == {
            ("class", "training"): facts[arm]["train"], ("class", "selection"): 30,
        }  # fmt: skip
        assert spent.images == {"labelled": facts[arm]["train"]}
        tests = run.facts["tests"]
        assert tests["plain"]["accuracy"] == run.facts["accuracy"]
        assert tests["invert"]["accuracy"] != tests["plain"]["accuracy"]


def test_an_arm_may_not_change_what_is_tested(tmp_path: Path) -> None:
    for own in ({"test": 30}, {"domains": {"test": ["blur"]}}, {"seed": 3}):
        path = _recipe(tmp_path, arms={"plain": {"data": own}})
        with pytest.raises(BadInput, match=r"tiny.yaml:\d+.* is the same for all arms"):
            load_recipe(path).arm("plain")
    with pytest.raises(BadInput, match=r"unknown field 'label'.*'labels'"):
        load_recipe(_recipe(tmp_path, arms={"plain": {"data": {"label": 3}}})).arm("plain")


def test_seeds_have_the_same_inputs_and_other_labels(tmp_path: Path) -> None:
    path = _recipe(tmp_path, data={"labels": 30}, train={"seeds": [0, 1]})
    jobs = Jobs(tmp_path)
    first, second = jobs.of(load_recipe(path))
    assert first.inputs == second.inputs
    sets = [jobs.images(j.recipe, j.arm, j.seed).train.ids.tolist() for j in (first, second)]
    assert sets[0] != sets[1]


def test_a_pretext_takes_no_labels_and_nothing_else_learns_without(tmp_path: Path) -> None:
    none = {"data": {"labels": 0}}
    train = {"epochs": 1, "batch_size": 40}
    with pytest.raises(BadInput, match="no label to learn from"):
        gv.run(_recipe(tmp_path, arms={"plain": none}), runs=tmp_path / "runs")
    pretext = {"simclr": {**none, "techniques": [{"simclr": {"dim": 8}}]}}
    with pytest.raises(BadInput, match=r"set data\.held_out"):
        gv.run(_recipe(tmp_path, arms=pretext, train=train), runs=tmp_path / "runs")
    path = _recipe(tmp_path, arms=pretext, train=train, data={"held_out": 60})
    run = _records(path, tmp_path / "runs")["simclr"]
    spent = counts(run.labels, run.images)
    assert spent is not None
    assert spent.labels["class", "training"] == 0
    assert run.facts["accuracy"] > 0.3  # of neighbours among those held out


@pytest.mark.parametrize("subset", ["random", "herding"])
def test_a_subset_refuses_what_nobody_labelled(tmp_path: Path, subset: str) -> None:
    arms = {"few": {"data": {"labels": 0}, "subset": {"method": subset, "per_class": 2}}}
    with pytest.raises(BadInput, match="class of every image, and that of 120 is not known"):
        gv.run(_recipe(tmp_path, arms=arms), runs=tmp_path / "runs")


# -- leaks ------------------------------------------------------------------------------------------


class Watched(DataSet):
    """Two classes a training can tell, whose images say when they are read."""

    name, source, licence = "watched", "here", "CC0-1.0"
    reads: ClassVar[list[tuple[str, int]]] = []
    labels: ClassVar[torch.Tensor] = torch.arange(4).repeat(20)

    def read(self) -> Stored:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 60, (120, 1, 8, 8), generator=generator, dtype=torch.uint8)
        pixels[:, 0, 0, 0] = torch.arange(120)

        def reader(part: str, first: int) -> Any:
            def read(row: int) -> torch.Tensor:
                type(self).reads.append((part, row))
                return pixels[first + row]

            return read

        train = Split(Lazy(reader("train", 0), range(80)), type(self).labels.clone())
        test = Split(Lazy(reader("test", 80), range(40)), torch.arange(4).repeat(10))
        return Stored(train, test, ("a", "b", "c", "d"), "0" * 64, 8, 1)


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dataset.DOOR.find
    monkeypatch.setattr(
        dataset.DOOR, "find", lambda name: Watched if name == "watched" else real(name)
    )
    monkeypatch.setattr(loading, "IN_MEMORY", 0)
    monkeypatch.setattr(Watched, "reads", [])


def _weights(folder: Path, runs: str, **changes: Any) -> dict[str, torch.Tensor]:
    fields = {"name": "watched", "train": 80, "test": 40, **changes.pop("data", {})}
    gv.run(_recipe(folder, data=fields, **changes), runs=folder / runs)
    return load_file(folder / runs / "tiny" / "plain" / "seed0" / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_hidden_label_changes_nothing_and_a_planted_one_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(24)

    def drawn(self: Any, groups: torch.Tensor, of: torch.Tensor, budget: Any) -> Any:
        return rows, of[24:]  # the same images, whatever the hidden labels

    monkeypatch.setattr(draws.Draw, "labelled", drawn)
    budget = {"labels": 24, "unlabeled": "rest"}
    true = _weights(tmp_path, "true", data=budget)
    poisoned = Watched.labels.clone()
    poisoned[24:] = (poisoned[24:] + 1) % 4
    monkeypatch.setattr(Watched, "labels", poisoned)
    assert _same(true, _weights(tmp_path, "hidden wrong", data=budget))
    known = Watched.labels.clone()
    known[:24] = (known[:24] + 1) % 4  # the test can fail: a label that is shown does count
    monkeypatch.setattr(Watched, "labels", known)
    assert not _same(true, _weights(tmp_path, "known wrong", data=budget))
    monkeypatch.setattr(ImageSet, "unlabeled", lambda self: self)
    with pytest.raises(GreenvisError, match="56 labels of 'unlabeled' would be shown"):
        _weights(tmp_path, "planted", data=budget)


def test_an_image_in_two_roles_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(self: Any, groups: torch.Tensor, of: torch.Tensor, budget: Any) -> Any:
        return of[:24], of[23:]

    monkeypatch.setattr(draws.Draw, "labelled", drawn)
    spec = data.DataSpec(name="watched", labels=24, unlabeled="rest")
    with pytest.raises(GreenvisError, match="an image of 'unlabeled' is of 'train', too"):
        data.load(spec)


def test_a_target_label_is_hidden_and_a_planted_one_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = data.DataSpec(name="watched", labels=40, domains={"target": ["invert"]})
    target = data.load(spec).target
    assert target is not None
    assert target.batch(range(40))[1].tolist() == [-1] * 40
    assert target.split.labels.eq(-1).all()  # nor does any door behind it hold one
    monkeypatch.setattr(ImageSet, "unlabeled", lambda self: self)
    with pytest.raises(GreenvisError, match="40 labels of 'target' would be shown"):
        data.load(spec)


def _reads_in_training(recipe: Path, runs: Path) -> set[tuple[str, str, int]]:
    """Return (phase, part, row) of all images read in phases of training."""
    from greenvis.experiment import loop
    from greenvis.experiment.jobs import Job
    from greenvis.meters.track import Tracker

    phases: set[tuple[str, str, int]] = set()
    session = Session(runs, False, (), lambda text: None)
    (job,) = session.plan(load_recipe(recipe))
    prepared = session.prepare(job)
    assert isinstance(job, Job)
    with prepared.tracker(runs) as tracker:
        assert isinstance(tracker, Tracker)

        class Reads(list[tuple[str, int]]):
            def append(self, read: tuple[str, int]) -> None:
                if tracker.current_phase.startswith("train"):
                    phases.add((tracker.current_phase.split("/epoch")[0], *read))

        Watched.reads = Reads()
        loop.run(prepared, tracker)
    return phases


def test_no_training_reads_a_test_image_and_a_planted_one_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"name": "watched", "train": 80, "test": 40, "labels": 40}
    path = _recipe(tmp_path, data=fields)
    seen = _reads_in_training(path, tmp_path / "runs")
    assert {part for _, part, _ in seen} == {"train"}
    assert len(seen) == 40
    real = Watched.read

    def planted(self: Watched) -> Stored:
        stored = real(self)
        images = torch.stack([stored.test.images[3], *(stored.train.images[i] for i in range(79))])
        return Stored(
            Split(images, stored.train.labels), stored.test, *list(vars(stored).values())[2:]
        )

    assert check_dataset(Watched).outcome == "works"
    monkeypatch.setattr(Watched, "read", planted)
    result = check_dataset(Watched)
    assert (result.outcome, result.reason) == ("fails", "1 of its test images are training images")


def test_no_task_reads_an_image_of_a_later_one_and_a_planted_one_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = {"tasks": 2, "order": "given"}
    fields = {"name": "watched", "train": 80, "test": 40, "stream": stream}
    path = _recipe(tmp_path, data=fields)

    def early(reads: set[tuple[str, str, int]]) -> list[int]:
        first = [row for phase, _, row in reads if phase == "train/task1"]
        assert first
        return [row for row in first if int(Watched.labels[row]) >= 2]

    assert not early(_reads_in_training(path, tmp_path / "runs"))
    for beside in ({"labels": 40, "unlabeled": "rest"}, {"domains": {"test": ["plain", "blur"]}}):
        with pytest.raises(BadInput, match="images are of tasks to come"):
            gv.run(_recipe(tmp_path, data={**fields, **beside}), runs=tmp_path / "other")
    real = data.streams._rows_of  # type: ignore[attr-defined]

    def planted(images: ImageSet, groups: Any) -> list[torch.Tensor]:
        rows = real(images, groups)
        return [torch.cat([rows[0], rows[1][:1]]), *rows[1:]] if len(images) == 80 else rows

    monkeypatch.setattr("greenvis.data.streams._rows_of", planted)
    assert len(early(_reads_in_training(_recipe(tmp_path, data=fields), tmp_path / "third"))) == 1
