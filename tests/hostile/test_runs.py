"""Finished runs that are not what they seem: weights, record and mark name each other, and one base
is trained once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from greenvis.experiment import checkpoint, jobs, session
from greenvis.meters import record
from tests.hostile import bounds

TINY = """\
name: {name}
data: {{name: digits, train: 64, test: 32, img_size: 8}}
model: {{ref: plain/mlp, img_size: 8, hidden: [8]}}
train: {{epochs: 1, batch_size: 32, seeds: [0]{more}}}
meter: {{codecarbon: false}}
arms:
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return a recipe of one arm."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(name="tiny", more="") + "  full: {}\n")
    return path


def run(recipe: Path, *overrides: str) -> tuple[Path, list[str]]:
    """Run it; return the seed's folder and what was said."""
    said: list[str] = []
    session.run(recipe, overrides=overrides, runs=recipe.parent / "runs", say=said.append)
    return recipe.parent / "runs" / "tiny" / "full" / "seed0", said


def mark(folder: Path) -> dict[str, Any]:
    """Return the mark of a finished run."""
    return json.loads((folder / jobs.DONE_FILE).read_text())


def test_mark_card_and_record_name_each_other(recipe: Path) -> None:
    from greenvis.experiment import lineage

    folder, _ = run(recipe)
    records = [record.read(path) for path in folder.glob("*.jsonl")]
    assert {r.id for r in records} == {mark(folder)["run"]} == {lineage.read_card(folder)["run"]}
    assert mark(folder)["weights"] == jobs._digest(folder / jobs.WEIGHTS_FILE)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "how", ["truncated", "of another run", "gone", "empty", "a link to nothing"]
)
def test_weights_that_are_not_the_runs_are_made_again(how: str, recipe: Path) -> None:
    folder, _ = run(recipe)
    path, right = folder / jobs.WEIGHTS_FILE, load_file(folder / jobs.WEIGHTS_FILE)
    whole = path.read_bytes()
    path.unlink()
    if how == "of another run":
        run(recipe, "train.lr=0.5", "name=tiny")
        other = path.read_bytes()
        assert other != whole
        run(recipe)
        path.write_bytes(other)
    elif how != "gone":
        path.symlink_to("nowhere") if "link" in how else path.write_bytes(
            whole[: len(whole) // 2 if how == "truncated" else 0]
        )
    _, said = run(recipe)
    assert any(
        "training; the weights that lie there are not those its run left" in line for line in said
    )
    again = load_file(path)
    assert all((again[name] == right[name]).all() for name in right)
    assert any("done before, kept" in line for line in run(recipe)[1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", ["of another model", "empty parts", "cut off", "a pipe"])
def test_a_checkpoint_that_is_none_of_its_is_said(how: str, recipe: Path) -> None:
    folder, _ = run(recipe)
    inputs = mark(folder)["inputs"]
    left = folder / f"{inputs}-{jobs.CHECKPOINT_FILE}"
    (folder / jobs.DONE_FILE).unlink()
    odd: dict[str, Any] = {part: {} for part in checkpoint.PARTS}
    if how == "a pipe":
        os.mkfifo(left)
    else:
        odd["live"] = {"a": torch.zeros(3)} if how == "of another model" else {}
        torch.save(odd, left)
        if how == "cut off":
            left.write_bytes(left.read_bytes()[:200])
    said = bounds.greenvis(
        "run", recipe.name, cwd=recipe.parent, seconds=60, growth=2**30,
    )  # fmt: skip
    assert said.code == 1, said
    assert f"{left.name} cannot be read" in said.err
    assert "remove it" in said.err
    left.unlink()
    assert any("training" in line for line in run(recipe)[1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "text", ["", "[", "[]", "3", '{"inputs": 3}', '{"inputs": null, "weights": 3}', "\0"]
)
def test_a_mark_that_is_none_means_not_done(text: str, recipe: Path) -> None:
    folder, _ = run(recipe)
    (folder / jobs.DONE_FILE).write_text(text)
    assert any("training" in line for line in run(recipe)[1])


def test_a_run_of_an_earlier_greenvis_counts_as_done(recipe: Path) -> None:
    folder, _ = run(recipe)
    old = {key: mark(folder)[key] for key in ("inputs", "run")} | {"accuracy": 0.5}
    (folder / jobs.DONE_FILE).write_text(json.dumps(old))
    assert any("done before, kept" in line for line in run(recipe)[1])


def test_other_versions_are_said(recipe: Path) -> None:
    folder, _ = run(recipe)
    old = mark(folder)
    old["versions"]["torch"] = "1.0"
    (folder / jobs.DONE_FILE).write_text(json.dumps(old))
    assert any("kept (made with other versions: torch 1.0 then" in line for line in run(recipe)[1])


def test_killed_before_any_of_its_writes_the_next_run_ends_right(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename of a run is a place to die at; the run before it had other settings."""
    folder, _ = run(recipe)
    right = load_file(folder / jobs.WEIGHTS_FILE)
    replace, left = os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        replace(source, target)

    killed_at, ended = 0, False
    while not ended:
        killed_at += 1
        run(
            recipe, "train.lr=0.5", "name=tiny"
        )  # other weights lie there under a mark of their own
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            left = killed_at
            try:
                run(recipe)
                ended = True
            except KeyboardInterrupt:
                pass
        _, said = run(recipe)
        now = load_file(folder / jobs.WEIGHTS_FILE)
        assert all((now[name] == right[name]).all() for name in right), (killed_at, said)
        assert mark(folder)["weights"] == jobs._digest(folder / jobs.WEIGHTS_FILE)
    assert killed_at >= 3  # weights, mark, …: if nothing was written by renames, nothing was tried


def together(folder: Path, *names: str) -> list[str]:
    """Run the recipes in processes that begin together; return what each said."""
    words = [("run", f"{name}.yaml") for name in names]
    answers = bounds.together(words, folder, growth=2**30, seconds=120)
    assert [said.code for said in answers] == [0] * len(names), answers
    return [said.err for said in answers]


def figures(runs: Path) -> dict[str, Any]:
    """Return, by run, its accuracy, its curve, and its weights."""
    left = {}
    for path in record.find([runs]):
        its = record.read(path)
        curve = [
            {k: v for k, v in line.items() if k in ("epoch", "step", "loss", "accuracy")}
            for line in its.logs
        ]
        weights = {
            name: t.tolist() for name, t in load_file(path.parent / jobs.WEIGHTS_FILE).items()
        }
        assert its.status == "done"
        assert str(path.parent) not in left
        left[str(path.parent.relative_to(runs))] = (its.facts["accuracy"], curve, weights)
    return left


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_two_recipes_on_one_base_train_it_once(rounds: int, tmp_path: Path) -> None:
    def write(folder: Path) -> Path:
        folder.mkdir()
        (folder / "base.yaml").write_text(TINY.format(name="base", more="") + "  full: {}\n")
        for name in ("one", "two"):
            text = TINY.format(name=name, more="") + "  tuned: {model: {init: 'run:base'}}\n"
            (folder / f"{name}.yaml").write_text(text)
        return folder

    alone = write(tmp_path / "alone")
    for name in ("one", "two"):
        together(alone, name)
    right = figures(alone / "runs")
    assert set(right) == {"base/full/seed0", "one/tuned/seed0", "two/tuned/seed0"}
    assert all(len(curve) == 2 and weights for _, curve, weights in right.values())
    for number in range(rounds):
        folder = write(tmp_path / str(number))
        said = together(folder, "one", "two")
        assert figures(folder / "runs") == right
        assert sum(text.count("base/full seed 0: training") for text in said) == 1
        assert sum(text.count("base/full seed 0: done before, kept") for text in said) == 1


def test_a_record_without_a_line_does_not_stop_the_next_run(recipe: Path) -> None:
    """A process killed between making its record and the first line of it leaves a file without a
    byte."""
    folder = recipe.parent / "runs" / "tiny" / "full" / "seed0"
    folder.mkdir(parents=True)
    (folder / "a.rank0.jsonl").touch()
    run(recipe)
    assert mark(folder)["weights"] == jobs._digest(folder / jobs.WEIGHTS_FILE)
    (folder / jobs.DONE_FILE).unlink()
    (folder / "b.rank0.jsonl").write_text("no record\n")
    with pytest.warns(UserWarning, match=r"left out: .*b\.rank0\.jsonl is not a greenvis record"):
        run(recipe)
    assert mark(folder)["weights"] == jobs._digest(folder / jobs.WEIGHTS_FILE)
