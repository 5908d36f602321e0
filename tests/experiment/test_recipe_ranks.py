"""`greenvis run` under real launchers (gloo): the weights, the records and the one report of a
recipe on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import interrupted
import psutil
import pytest
import torch
from safetensors.torch import load_file

from greenvis.meters import pricing, record
from greenvis.report.groups import load

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# accelerate has no launcher of its own for several CPU processes but by MPI; without a GPU these
# meet over gloo as well
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
"1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
              "0")  # fmt: skip
MODEL = (
    "{ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, "
    "num_heads: 2}"
)
RECIPE = f"""\
name: tiny
data: {{name: digits, train: 203, test: 101, held_out: 40}}
model: {MODEL}
train: {{epochs: 2, batch_size: 20, optimizer: sgd, lr: 0.2, threads: 1, clip_norm: 1.0}}
meter: {{codecarbon: false}}
arms:
  plain: {{}}
"""
ARMS = """\
  lora: {model: {init: "run:plain", classifier: keep}, techniques: [{lora: {rank: 2}}]}
  taught: {train: {accumulate: 2}, techniques: [{distill: {teacher: "run:plain", cache: true}}]}
  exits: {techniques: [{early_exit: {at: [0.5]}}]}
  parted: {stages: [{name: head, layers: [head]}, {name: all, techniques: [layer_decay]}]}
  few: {subset: {method: herding, per_class: 5, width: 4}}
"""


def _write(folder: Path, text: str = RECIPE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(text)
    return folder


def _command(folder: Path, launcher: tuple[str, ...], *more: str) -> list[str]:
    words = [*launcher, "-m", "greenvis"] if launcher else ["greenvis"]
    its = [
        "run",
        str(folder / "tiny.yaml"),
        "--runs",
        str(folder / "runs"),
        "--out",
        str(folder / "report"),
        *more,
    ]
    return [sys.executable, "-m", *words, *its]


def _run(
    folder: Path, launcher: tuple[str, ...] = TORCHRUN, *more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(folder, launcher, *more), env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def _apart(one: Path, other: Path, arm: str) -> float:
    """Return how far the weights two runs left are apart: the length of the difference over their
    length."""
    states = [
        load_file(folder / "runs" / "tiny" / arm / "seed0" / "model.safetensors")
        for folder in (one, other)
    ]
    assert states[0].keys() == states[1].keys()
    named = [n for n, t in states[0].items() if t.is_floating_point() and t.isfinite().all()]
    assert len(named) > 20
    a, b = (torch.cat([state[n].double().flatten() for n in named]) for state in states)
    return ((a - b).norm() / a.norm()).item()


def _said(done: subprocess.CompletedProcess[str] | forked.Greenvis) -> list[str]:
    said = ("greenvis:", "tiny", "run ")
    return [line for line in done.stderr.splitlines() if line.startswith(said)]


def test_two_processes_train_a_recipe_and_one_reports(tmp_path: Path) -> None:
    folders = ("--runs", "runs", "--out", "report")
    both = forked.ranks(
        "run", "tiny.yaml", *folders, "--set", "train.epochs=1", cwd=_write(tmp_path)
    )
    begun, over = [line for process in both for line in _said(process)]
    assert begun == "run 1 of 1: tiny.epochs-1/plain seed 0: training"
    assert over.startswith("run 1 of 1: tiny.epochs-1/plain seed 0: accuracy ")
    assert sum(process.stdout.count("report:") for process in both) == 1
    runs = [record.read(path) for path in record.find([tmp_path / "runs"])]
    assert sorted((r.header["rank"], r.header["world_size"], r.status) for r in runs) == [
        (0, 2, "done"),
        (1, 2, "done"),
    ]
    assert len({r.id for r in runs}) == 1
    assert sum(r.sum("samples", "train") or 0 for r in runs) == 203
    assert abs((runs[0].sum("steps", "train") or 0) - (runs[1].sum("steps", "train") or 0)) == 0
    (group,) = load([tmp_path / "runs"]).groups
    (attempt,) = group.attempts
    assert attempt.missing_ranks == []
    by_phase = pricing.merge(runs).energy.values()
    total = pricing.add([reading for components in by_phase for reading in components.values()])
    assert total.value == pytest.approx(
        pricing.add([attempt.total_energy_j, attempt.startup_j]).value
    )
    assert attempt.total_energy_j.value == pytest.approx(
        sum(pricing.run_energy(r).value or 0 for r in runs)
    ) or any(c["scope"] == "machine" for c in runs[0].header["components"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("held_out: 40", "stream: {tasks: 5}", "a recipe learns a stream of tasks as one process"),
        (
            "plain: {}",
            "plain: {techniques: [{replay: {size: 20}}]}",
            "each process holds a part of what 'replay' keeps",
        ),
        (
            "batch_size: 20",
            "batch_size: 101",
            "batches of 101 out of 203 images end with one of 1, which 2 processes cannot",
        ),
    ],
)
def test_what_several_processes_cannot_share_is_refused_once_before_anything_is_written(
    old: str, new: str, why: str, tmp_path: Path
) -> None:
    done = _run(_write(tmp_path, RECIPE.replace(old, new)))
    assert why in done.stderr
    assert len(_said(done)) == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = [_write(tmp_path_factory.mktemp(name), RECIPE + ARMS) for name in ("one", "two")]
    for folder, launcher in zip(folders, ((), TORCHRUN), strict=True):
        done = _run(folder, launcher)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders[0], folders[1]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "lora", "taught", "exits", "parted", "few"])
def test_a_recipe_ends_with_the_weights_of_one_process(
    finished: tuple[Path, Path], arm: str
) -> None:
    one, two = finished
    assert _apart(one, two, arm) <= 1e-6
    left = [
        json.loads((f / "runs" / "tiny" / arm / "seed0" / "done.json").read_text())
        for f in finished
    ]
    accuracies = [
        {record.read(p).facts["accuracy"] for p in record.find([f / "runs" / "tiny" / arm])}
        for f in finished
    ]
    assert accuracies[0] == accuracies[1]
    assert left[0]["inputs"] == left[1]["inputs"]


@pytest.mark.slow
def test_the_report_counts_each_process_once(finished: tuple[Path, Path]) -> None:
    results = [json.loads((folder / "report" / "results.json").read_text()) for folder in finished]
    assert [r["order"] for r in results] == [results[0]["order"]] * 2
    for name in results[0]["arms"]:
        one, two = (r["arms"][name] for r in results)
        assert one["train_flops"] == pytest.approx(two["train_flops"], rel=0.1)
    for folder in finished:  # each image's teacher is asked once, whichever process does
        (row,) = json.loads((folder / "report" / "results.json").read_text())["arms"]["taught"][
            "kept"
        ]
        assert (row["misses"], row["hits"]) == (203, 203)
    ids = [
        u["runs"]
        for path in record.find([finished[1] / "runs" / "tiny" / "taught"])
        for u in record.read(path).uses
    ]
    assert ids
    assert all(len(one) == 1 for one in ids)  # a teacher of two processes is one run


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_a_killed_recipe_goes_on_with_another_number_of_processes(
    first: int, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("--set", interrupted.EVERY_STEP)
    _write(tmp_path)
    launchers: dict[int, tuple[str, ...]] = {1: (), 2: TORCHRUN}
    reached = tmp_path / "reached"
    command = _command(tmp_path, launchers[first], *settings)
    at = command.index("greenvis")
    command[at - 1 : at + 1] = [interrupted.__file__, "epoch == 1 and batch == 4"]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "INTERRUPTED_FILE": str(reached)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not reached.exists() and process.poll() is None:
        time.sleep(0.01)
    started = psutil.Process(process.pid)
    for one in (
        *started.children(recursive=True),
        started,
    ):  # a launcher's processes lead sessions of their own
        one.kill()
    process.wait()
    assert reached.exists(), "it ended before it could be killed"
    done = _run(tmp_path, launchers[3 - first], *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(
        "resumed at epoch 1, batch 4" in n
        for path in record.find([tmp_path / "runs"])
        for n in record.read(path).notes
    )
    assert _apart(finished[0], tmp_path, "plain") <= 1e-6


@pytest.mark.slow
def test_what_fails_in_one_process_ends_all(tmp_path: Path) -> None:
    done = _run(
        _write(
            tmp_path,
            RECIPE.replace("lr: 0.2", "lr: 1.0e+20").replace("clip_norm: 1.0", "clip_norm: null"),
        )
    )
    assert done.returncode != 0
    assert [line for line in _said(done) if "lower train.lr" in line] == _said(done)[1:]
    assert {record.read(path).status for path in record.find([tmp_path / "runs"])} <= {
        "failed",
        "stopped",
    }


@pytest.mark.slow
def test_accelerate_launches_a_recipe(finished: tuple[Path, Path], tmp_path: Path) -> None:
    done = _run(_write(tmp_path), ACCELERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _apart(finished[0], tmp_path, "plain") <= 1e-6
