"""Structures searched by short trainings: how candidates are made, who pays for trials, what is
looked at, and how it goes on where it was cut off."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import greenvis as gv
from greenvis import models
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import jobs, search
from greenvis.experiment.recipe import SearchSpec
from greenvis.experiment.run_folder import SEARCH_FILE
from greenvis.meters import record

CHOICES = {name: [1, 2, 4, 8] for name in "abcdef"}

RECIPE = """\
name: dilated
data: {name: digits, train: 60, test: 40, held_out: 30}
model: {ref: timm/resnet18, img_size: 8, in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 4, 4], output_stride: 8}
train: {epochs: 2, batch_size: 30, lr: 1.0e-2, threads: 1, eval_every: 0}
arms:
  plain: {}
  global:
    techniques: [{rfnext: {branches: 1}}]
    search: {trials: 4, population: 2}
meter: {codecarbon: false}
"""


def test_a_child_is_a_segment_of_one_in_the_other() -> None:
    low, high = (dict.fromkeys(CHOICES, value) for value in (1, 8))
    made = [search.child(CHOICES, [(low, 0.5), (high, 0.5)], 0.0, Random(i)) for i in range(200)]
    for one in made:
        values = [*one.values()]
        assert set(values) <= {1, 8}
        assert sum(a != b for a, b in itertools.pairwise(values)) <= 2  # two anchors
    assert len({tuple(one.values()) for one in made}) > 10


def test_parents_are_drawn_in_proportion_to_fitness() -> None:
    low, high = (dict.fromkeys(CHOICES, value) for value in (1, 8))
    every = [search.child(CHOICES, [(low, 0.2), (high, 0.8)], 0.0, Random(i)) for i in range(800)]
    firsts = Counter(one["f"] for one in every if len(set(one.values())) == 1)
    share = firsts[8] / sum(firsts.values())
    assert share > 0.7
    mean = sum(v == 8 for one in every for v in one.values()) / (800 * 6)
    assert mean == pytest.approx(0.8, abs=0.04)


def test_mutation_draws_exponents_so_that_none_is_likelier() -> None:
    same = [(dict.fromkeys(CHOICES, 1), 1.0)]
    every = [search.child(CHOICES, same, 1.0, Random(i)) for i in range(800)]
    counts = Counter(value for one in every for value in one.values())
    assert all(n / (800 * 6) == pytest.approx(0.25, abs=0.03) for n in counts.values())


def test_the_networks_own_is_tried_first_and_nothing_twice() -> None:
    spec, past = SearchSpec(trials=8, population=3, mutation=0.5), []
    own = dict.fromkeys(CHOICES, 1)
    for i in range(8):
        past.append((search.proposed(spec, CHOICES, own, past, seed=3), 1.0 + i))
    assert past[0][0] == own
    assert len({tuple(one.values()) for one, _ in past}) == 8
    assert search.proposed(spec, CHOICES, own, past, seed=3) == search.proposed(
        spec, CHOICES, own, past, seed=3
    )
    only = {"a": [1]}
    assert search.proposed(spec, only, {"a": 1}, [({"a": 1}, 1.0)], seed=0) == {"a": 1}


def _write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "dilated.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    gv.run(_write(folder), runs=folder / "runs")
    return folder


def _run(folder: Path, arm: str = "global") -> record.Run:
    return record.read(next(iter(record.find([folder / "runs" / "dilated" / arm]))))


def test_every_trial_is_the_arms_to_pay(finished: Path) -> None:
    run, plain = _run(finished), _run(finished, "plain")
    phases = {name.partition("/epoch")[0] for name in run.totals}
    assert {f"search/trial{i}" for i in range(1, 5)} <= phases
    assert run.sum("cpu_s") > 2 * plain.sum("cpu_s", "train")  # type: ignore[operator]
    searched = run.facts["search"]
    candidates, metrics = zip(*searched["trials"], strict=True)
    assert len(candidates) == 4
    assert searched["chosen"] == candidates[metrics.index(max(metrics))]
    assert all(metric in {n / 30 for n in range(31)} for metric in metrics)  # of those held out


def test_the_dilations_stand_beside_the_weights(finished: Path) -> None:
    chosen = _run(finished).facts["search"]["chosen"]
    file = finished / "runs" / "dilated" / "global" / "seed0" / "model.safetensors"
    model = models.build(f"file:{file}")
    assert {path: model.get_submodule(path).dilation[0] for path in chosen} == chosen  # type: ignore[index, union-attr]


@pytest.mark.slow
def test_the_training_proper_begins_with_the_first_weights(tmp_path: Path) -> None:
    """With nothing to choose, it ends as a training without trials."""
    still = RECIPE.replace("{branches: 1}", "{branches: 1, most: 1}")
    gv.run(_write(tmp_path, still), runs=tmp_path / "runs")
    plain, searched = (
        models.build(f"file:{tmp_path}/runs/dilated/{arm}/seed0/model.safetensors").state_dict()
        for arm in ("plain", "global")
    )
    for name, value in plain.items():
        torch.testing.assert_close(searched[name], value, msg=name)


def test_it_goes_on_with_the_trials_there_are(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from greenvis.experiment import loop

    fit = loop.Loop.fit

    def cut(self: Any, part: Any, number: int) -> int:
        if number == 2:
            raise KeyboardInterrupt
        return fit(self, part, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "fit", cut)
        with pytest.raises(KeyboardInterrupt):
            gv.run(_write(tmp_path), runs=tmp_path / "runs", overrides=())
    gv.run(tmp_path / "dilated.yaml", runs=tmp_path / "runs")
    runs = [record.read(p) for p in record.find([tmp_path / "runs" / "dilated" / "global"])]
    last = max(runs, key=lambda run: run.header["attempt"])
    assert len(runs) == 2
    assert last.facts["search"] == _run(finished).facts["search"]
    assert last.facts["accuracy"] == _run(finished).facts["accuracy"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (", held_out: 30", "", "set data.held_out"),
        ("techniques: [{rfnext: {branches: 1}}]", "techniques: [ema]", "has any to choose"),
        ("population: 2", "population: 2, method: random", "population"),
        ("trials: 4", "trials: 0", "trials"),
        (
            "search: {trials: 4, population: 2}",
            "search: {trials: 4}\n    active: {start: 20, rounds: 2}",
            "search or active",
        ),
    ],
)
def test_refusals(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.run(_write(tmp_path, RECIPE.replace(old, new)), runs=tmp_path / "runs")


def test_a_damaged_list_of_trials_says_what_to_do(tmp_path: Path) -> None:
    recipe = gv.load_recipe(_write(tmp_path))
    job = next(j for j in jobs.Jobs(tmp_path / "runs").of(recipe) if j.arm.name == "global")
    job.folder.mkdir(parents=True)
    (job.folder / f"{job.inputs}-{SEARCH_FILE}").write_text('{"trials": [[{"a": "x"}, 1]]}')
    with pytest.raises(GreenvisError, match="remove it to start this arm again"):
        gv.run(recipe, runs=tmp_path / "runs")
