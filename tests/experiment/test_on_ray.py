"""Sweeps, and the same recipe on a real Ray cluster: a killed worker costs its attempt, never a
run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from greenvis.errors import BadInput
from greenvis.experiment import sweep
from greenvis.meters import record

RECIPE = """\
name: tiny
data: {name: digits, train: 120, test: 60}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}
train: {epochs: 2, batch_size: 20, threads: 1, seeds: [0, 1]}
arms: {plain: {}, built: {model: {init: "run:plain"}, techniques: [linear_probe]}}
meter: {codecarbon: false, country: FRA}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


# -- sweeps ---------------------------------------------------------------------------------------


def test_one_value_is_no_sweep(folder: Path) -> None:
    ((recipe, overrides),) = sweep.load(
        folder / "tiny.yaml", ["train.epochs=3", "train.seeds=[0, 1]", 'report.title="a, b"']
    )
    made = (recipe.name, recipe.train.epochs, recipe.train.seeds, recipe.report.title)
    assert made == ("tiny.epochs-3", 3, (0, 1), "a, b")
    assert sweep.load(folder / "tiny.yaml", overrides)[0][0].text() == recipe.text()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "tiny"),
        (
            [
                "train.seeds=[0]",
                "arms.plain.train.workers=2",
                "report.title=x",
                "meter.country=FRA",
            ],
            "tiny",
        ),
        (["arms.plain.train.lr=0.1"], "tiny.lr-0.1"),
        (["train.lr=0.1", "name=own"], "own"),
        (["train.lr=0.1,0.2", "name=own", "train.epochs=2"], "own.lr-0.1"),
        (["data.classes=[0, 1, 2]"], "tiny.classes-0-1-2"),
    ],
)
def test_what_changes_the_training_has_a_name_of_its_own(
    folder: Path, overrides: list[str], name: str
) -> None:
    assert sweep.load(folder / "tiny.yaml", overrides)[0][0].name == name


def test_a_long_name_is_cut_and_stays_unique(folder: Path) -> None:
    names = {sweep.named("tiny", [f"model.pretrained={'x' * 200}{end}"]) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) < 140 for name in names)


def test_every_combination_is_a_recipe_of_its_own(folder: Path) -> None:
    made = sweep.load(
        folder / "tiny.yaml", ["train.lr=0.1,0.01", "train.epochs=1, 2,2", "train.batch_size=10"]
    )
    assert [r.name for r, _ in made] == [
        f"tiny.lr-{lr}.epochs-{epochs}.batch_size-10" for lr in ("0.1", "0.01") for epochs in (1, 2)
    ]  # fmt: skip
    assert [(r.train.lr, r.train.epochs) for r, _ in made] == [
        (0.1, 1),
        (0.1, 2),
        (0.01, 1),
        (0.01, 2),
    ]
    assert all(r.train.batch_size == 10 for r, _ in made)
    again = [sweep.load(folder / "tiny.yaml", overrides) for _, overrides in made]
    assert [its[0][0].text() for its in again] == [r.text() for r, _ in made]
    title = sweep.title(folder / "tiny.yaml", ["train.lr=0.1,0.01", "train.batch_size=10"])
    assert title == "tiny.lr-0.1-0.01.batch_size-10"


def test_keys_that_end_alike_are_told_apart(folder: Path) -> None:
    made = sweep.load(
        folder / "tiny.yaml", ["arms.plain.train.lr=0.1,0.2", "arms.built.train.lr=0.3,0.4"]
    )
    assert made[0][0].name == "tiny.arms.plain.train.lr-0.1.arms.built.train.lr-0.3"
    assert len({r.name for r, _ in made}) == 4


def test_refuses_an_empty_value_and_a_wrong_one(folder: Path) -> None:
    with pytest.raises(BadInput, match="a value between the commas is missing"):
        sweep.load(folder / "tiny.yaml", ["train.lr=0.1,,0.2"])
    with pytest.raises(BadInput, match="epochs"):
        sweep.load(folder / "tiny.yaml", ["train.epochs=1,two"])


# -- Ray ------------------------------------------------------------------------------------------


def _greenvis(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "greenvis", "run", str(folder / "tiny.yaml"), *words]


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def _records(runs: Path) -> list[record.Run]:
    return [record.read(path) for path in record.find([runs])]


def _kill_one(runs: Path, deadline: float) -> int:
    """Kill the first worker whose run is under way; return its process id."""
    while time.monotonic() < deadline:
        for its in _records(runs) if runs.is_dir() else []:
            if its.end is None:
                os.kill(its.header["pid"], signal.SIGKILL)
                return its.header["pid"]
        time.sleep(0.02)
    raise AssertionError("no run was ever under way")


def _comparable(results: dict[str, Any]) -> dict[str, Any]:
    """Return what two reports of the same work must have in common: all but energy, time and
    dates."""
    keys = (
        "accuracy",
        "macs",
        "params",
        "trainable_params",
        "seeds",
        "n",
        "techniques",
        "delta_bytes",
    )
    arms = {name: {k: arm[k] for k in keys if k in arm} for name, arm in results["arms"].items()}
    return {"arms": arms, "baseline": results["baseline"], "name": results["name"]}


def test_refuses_an_unknown_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from greenvis.cli import main as cli

    assert cli.main(["run", str(folder / "tiny.yaml"), "--on", "rya"]) == 2
    assert "cannot run on 'rya'; did you mean 'ray'" in capsys.readouterr().err


@pytest.mark.slow
def test_twelve_runs_with_one_worker_killed_report_as_one_after_another(folder: Path) -> None:
    pytest.importorskip("ray")
    sweeps = ["--set", "train.lr=0.01,0.003,0.001"]
    alone, spread = folder / "alone", folder / "spread"
    subprocess.run(
        [*_greenvis(folder, *sweeps), "--runs", str(alone), "--out", str(folder / "a")],
        env=_environment(), cwd=folder, check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    driver = subprocess.Popen(
        [*_greenvis(folder, *sweeps), "--on", "ray", "--runs", str(spread), "--out",
        str(folder / "b")],
        env=_environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed = _kill_one(spread, time.monotonic() + 600)
    _, said = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    assert "once more (try 2 of 3)" in said
    assert "done, 12 of 12" in said
    found = _records(spread)
    finished = [r for r in found if r.status == "done"]
    assert len(finished) == 12
    assert len({(r.header["name"], r.header["arm"], r.header["seed"]) for r in finished}) == 12
    lost = [r for r in found if r.status != "done"]
    assert [r.header["pid"] for r in lost] == [
        killed
    ]  # its energy was spent, and stays in the totals
    assert len({r.header["pid"] for r in finished}) >= 2
    one, other = (json.loads((folder / name / "results.json").read_text()) for name in ("a", "b"))
    assert _comparable(one) == _comparable(other)
    assert len(one["arms"]) == 6
    assert not list(spread.glob(".ray-*"))


@pytest.mark.slow
def test_a_failing_job_is_reported_and_the_others_are_there(folder: Path) -> None:
    pytest.importorskip("ray")
    (folder / "tiny.yaml").write_text(
        RECIPE.replace("seeds: [0, 1]", "seeds: [0]").replace(
            "plain: {}", "plain: {train: {lr: 1.0e+30}}, other: {}"
        )
    )
    done = subprocess.run(
        [*_greenvis(folder), "--on", "ray", "--runs", str(folder / "runs"), "--out",
        str(folder / "out")],
        env=_environment(), cwd=folder, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 runs failed" in done.stderr
    assert "the loss is" in done.stderr
    assert "it needs tiny/plain seed 0, which failed" in done.stderr
    assert "other" in json.loads((folder / "out/results.json").read_text())["arms"]
