"""Recipes run for real: skipped when done, resumed when killed, refused before anything is
written."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import interrupted
import pytest
from forked import greenvis
from safetensors.torch import load_file

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import run_folder, session
from greenvis.meters import pricing, record

RECIPE = """\
name: tiny
data: {name: digits, train: 200, test: 100}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {epochs: 2, batch_size: 20, lr: 1.0e-3, seeds: [0, 1], threads: 1, checkpoint_every_s: 0.05}
arms:
  plain: {}
  teacher: {model: {embed_dim: 32}, train: {seeds: [0]}}
  student: {techniques: [{distill: {teacher: "run:teacher"}}]}
meter: {codecarbon: false}
"""


def _write(folder: Path, text: str = RECIPE, name: str = "tiny.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _runs(folder: Path) -> list[record.Run]:
    return [record.read(path) for path in record.find([folder])]


def _weights(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("model.safetensors"))
    }


def _same_weights(a: Path, b: Path) -> bool:
    one, two = _weights(a), _weights(b)
    assert one
    assert one.keys() == two.keys()
    return all((t == two[f][k]).all() for f, state in one.items() for k, t in state.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    session.run(_write(folder), runs=folder / "runs")
    return folder


def test_every_arm_and_seed_is_recorded(finished: Path) -> None:
    runs = {(r.header["arm"], r.header["seed"]): r for r in _runs(finished / "runs")}
    assert sorted(runs) == [
        ("plain", 0),
        ("plain", 1),
        ("student", 0),
        ("student", 1),
        ("teacher", 0),
    ]
    for run in runs.values():
        assert run.status == "done"
        assert 0 <= run.facts["accuracy"] <= 1
        assert (run.sum("samples", "train"), run.sum("steps", "train")) == (400, 20)
        assert run.facts["macs"] > 0
        assert run.facts["params"] == run.facts["trainable_params"]
        assert run.facts["data"]["train"] == 200
        assert (pricing.run_energy(run).value or 0) > 0
    assert runs["student", 1].sum("wall_s", "train/epoch1/teacher")
    assert runs["student", 0].sum("flops", "train") > runs["plain", 0].sum("flops", "train")


def test_what_an_arm_builds_on_is_named_with_its_energy(finished: Path) -> None:
    runs = {(r.header["arm"], r.header["seed"]): r for r in _runs(finished / "runs")}
    (used,) = pricing.uses(runs["student", 1])
    teacher = runs["teacher", 0]
    assert (used["role"], used["name"], used["runs"]) == ("teacher", "tiny/teacher", [teacher.id])
    assert used["energy_j"]["value"] == pytest.approx(pricing.run_energy(teacher).value)


def test_finished_arms_are_kept_until_something_changes(finished: Path) -> None:
    said: list[str] = []
    session.run(finished / "tiny.yaml", runs=finished / "runs", say=said.append)
    assert len(said) == 5
    assert all("kept" in line for line in said)
    said.clear()
    copy = finished / "runs2"
    shutil.copytree(finished / "runs", copy)
    session.run(
        finished / "tiny.yaml", overrides=["arms.plain.train.epochs=1"], runs=copy, say=said.append
    )
    assert [line for line in said if "training" in line] == [
        "tiny/plain seed 0: training",
        "tiny/plain seed 1: training",
    ]
    said.clear()
    before = len(_runs(copy))
    session.run(
        finished / "tiny.yaml",
        overrides=["train.seeds=[0]"],
        runs=copy,
        fresh=True,
        say=said.append,
    )
    assert sum("training" in line for line in said) == 3
    assert len(_runs(copy)) == before + 3


def test_a_further_seed_of_a_teacher_changes_its_own_student_alone(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    said: list[str] = []
    session.run(
        finished / "tiny.yaml",
        overrides=["arms.teacher.train.seeds=[0, 1]"],
        runs=tmp_path / "runs",
        say=said.append,
    )
    assert [line for line in said if "training" in line] == [
        "tiny/teacher seed 1: training",
        "tiny/student seed 1: training",  # whose teacher was that of seed 0
    ]


def test_the_same_recipe_gives_the_same_weights(finished: Path, tmp_path: Path) -> None:
    session.run(_write(tmp_path), runs=tmp_path / "runs")
    assert _same_weights(finished / "runs", tmp_path / "runs")


def test_killed_in_the_middle_it_goes_on_to_the_same_weights_and_keeps_the_energy(
    finished: Path, tmp_path: Path
) -> None:
    _write(tmp_path)
    words = ["run", "tiny.yaml", "--json"]
    moment = "'student/seed0' in path and epoch == 1 and batch == 4"
    cut = greenvis(*words, "--set", interrupted.EVERY_STEP, cwd=tmp_path, moment=moment)
    assert cut.returncode == -signal.SIGKILL
    killed = [r for r in _runs(tmp_path / "runs") if r.status == "crashed"]
    assert [(r.header["arm"], r.header["seed"]) for r in killed] == [("student", 0)]

    done = greenvis(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _same_weights(finished / "runs", tmp_path / "runs")
    attempts = _runs(tmp_path / "runs/tiny/student/seed0")
    assert len(attempts) == 2
    assert "resumed at epoch 1, batch 4" in attempts[1].notes
    (whole,) = _runs(finished / "runs/tiny/student/seed0")
    losses = [
        {line["epoch"]: line["loss"] for run in runs for line in run.logs if "loss" in line}
        for runs in (attempts, [whole])
    ]
    assert losses[0] == losses[1]  # of the whole epoch, whichever attempt ended it
    student = json.loads(done.stdout)["results"]["arms"]["student"]
    spent = [
        sum(
            pricing.run_energy(r).value or 0 for r in _runs(tmp_path / f"runs/tiny/student/seed{s}")
        )
        for s in (0, 1)
    ]
    assert student["total_energy_j"]["value"] == pytest.approx(sum(spent) / 2, rel=1e-6)


def test_another_recipe_can_be_built_on(tmp_path: Path) -> None:
    _write(tmp_path)
    text = RECIPE.replace("name: tiny", "name: heir").split("arms:")[0] + (
        "arms:\n"
        "  heir: {model: {init: 'run:tiny/plain'}, train: {epochs: 1, seeds: [0]}}\n"
        "  scratch: {train: {epochs: 1, seeds: [0]}}\n"
        "meter: {codecarbon: false}\n"
    )
    session.run(_write(tmp_path, text, "heir.yaml"), runs=tmp_path / "runs")
    runs = {(r.header["name"], r.header["arm"]): r for r in _runs(tmp_path / "runs")}
    assert sorted(runs) == [("heir", "heir"), ("heir", "scratch"), ("tiny", "plain")]
    (used,) = runs["heir", "heir"].uses
    assert (used["role"], used["name"]) == ("base", "tiny/plain")
    base = load_file(tmp_path / "runs/tiny/plain/seed0/model.safetensors")
    assert base  # the heir's weights start from it and move on
    assert runs["heir", "heir"].facts["accuracy"] != runs["heir", "scratch"].facts["accuracy"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vit_tiny_patch16_224", "vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
        ("name: digits,", "name: digitz,", "did you mean 'digits'"),
        ("train: 200", "train: 20000", "1347"),
        ("name: digits,", "name: 'folder:nowhere',", "nowhere"),
        ("run:teacher", "run:techer", "did you mean 'teacher'"),
        ("img_size: 8,", "img_size: 16,", "cannot take images of 1×8×8"),
        ("depth: 2,", "num_classes: 3, depth: 2,", "the data has 10 classes"),
        ("embed_dim: 16", "embed_dimm: 16", "did you mean 'embed_dim'"),
        (
            RECIPE.splitlines()[2][7:],
            "{ref: torchvision/resnet18, img_size: 64}",
            "which changes nothing here",
        ),
        ("train: 200", "train: 200, views: 2", "views changes nothing with augment: none"),
        ("embed_dim: 32", "init: 'run:student'", "circle"),
        ("ref: timm/vit_tiny_patch16_224", "ref: 'torch.nn:Identity'", "--trust"),
        ("{}", "{techniques: [{lora: {targets: ['atn.*']}}]}", "no Linear matches 'atn.*'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RECIPE
    path = _write(tmp_path, RECIPE.replace(old, new))
    with pytest.raises(BadInput) as caught:
        gv.run(path, runs=tmp_path / "runs")
    assert message in str(caught.value)
    assert f"{path}:" in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_do_not_run_one_recipe_into_one_folder(finished: Path) -> None:
    with (
        run_folder.locked(finished / "runs" / "tiny"),
        pytest.raises(GreenvisError, match="another process"),
    ):
        session.run(finished / "tiny.yaml", runs=finished / "runs")


def test_a_launcher_that_shards_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` sets it
    path = _write(tmp_path)
    with pytest.raises(BadInput, match=r"FSDP cuts .* use plain data parallelism"):
        session.run(path, runs=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_techniques_see_images_of_the_size_that_is_trained_on(tmp_path: Path) -> None:
    """A convolutional network takes images of any size: what an exit saves is counted on the
    data's."""
    path = _write(
        tmp_path,
        "name: sized\nmodel: {ref: torchvision/resnet18}\n"
        "data: {name: digits, train: 40, test: 20, img_size: 32, in_chans: 3}\n"
        "train: {epochs: 1, batch_size: 20, seeds: [0], threads: 1}\nmeter: {codecarbon: false}\n"
        "arms: {early: {techniques: [{early_exit: {at: [0.5]}}]}}\n",
    )
    session.run(path, runs=tmp_path / "runs")
    facts = _runs(tmp_path / "runs")[0].facts
    never = next(p for p in facts["operating_points"] if p["setting"] == "never")
    assert never["macs"] == pytest.approx(facts["macs"], rel=0.01)
