"""A process that works for a training is killed by the system in the middle of it: one clear line,
and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from greenvis.experiment import checkpoint
from greenvis.meters import record

RECIPE = """\
name: tiny
data: {name: digits, train: 256, test: 32, img_size: 8}
model: {ref: plain/mlp, img_size: 8, hidden: [8]}
train: {epochs: 4, batch_size: 8, checkpoint_every_s: 1.0e-9, eval_every: 0, workers: WORKERS}
meter: {codecarbon: false}
arms: {full: {}}
"""
RUN = ("-m", "greenvis", "run", "tiny.yaml")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start Python there; what it says goes to a file, for nobody reads along."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=env, stdout=said, stderr=said, text=True
        )


def running(process: subprocess.Popen[str]) -> bool:
    """Return whether it still runs a moment later."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.02)
    return process.returncode is None


@pytest.mark.parametrize(
    ("workers", "launcher", "victim"),
    [
        pytest.param(1, (), "loads images", id="loader"),
        pytest.param(0, TORCHRUN, "rank 1", id="rank", marks=pytest.mark.slow),
        pytest.param(0, TORCHRUN, "rank 0", id="first-rank", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_costs_no_more_than_since_the_checkpoint(
    workers: int, launcher: tuple[str, ...], victim: str, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    for one in (folder, tmp_path / "whole"):
        one.mkdir()
        (one / "tiny.yaml").write_text(RECIPE.replace("WORKERS", str(workers)))
    process = start(folder, *launcher, *RUN)
    while not list((folder / "runs").rglob("*checkpoint.pt")):
        assert running(process), (folder / "said").read_text()
    while running(process):  # a worker that was just about to end is followed by another
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if not launcher or child.environ().get("RANK") == victim[-1]:
                    child.kill()
            except psutil.NoSuchProcess:
                continue
    said = (folder / "said").read_text()
    ours = [line for line in said.splitlines() if line.startswith("greenvis: ")]
    assert process.returncode == 1
    if launcher:  # which says which process was killed, in words of its own
        assert f"rank      : {victim[-1]} (local_rank: {victim[-1]})\n  exitcode  : -9" in said
        assert all("another process of this training ended" in line for line in ours)
        assert said.count("Traceback (most recent call last)") <= 1
    else:
        (line,) = ours
        assert "a process that loads images was killed: set train.workers lower" in line
        assert "Traceback" not in said
    (saved,) = (folder / "runs").rglob("*checkpoint.pt")
    assert checkpoint.read(saved)["progress"]
    assert [run.damaged_lines for run in map(record.read, record.find([folder / "runs"]))] == [
        0
    ] * (2 if launcher else 1)
    for where in (folder, tmp_path / "whole"):
        assert start(where, *launcher, *RUN).wait(300) == 0, (where / "said").read_text()
    notes = [note for path in record.find([folder / "runs"]) for note in record.read(path).notes]
    assert any(note.startswith("resumed at epoch") for note in notes)
    left = Path("runs", "tiny", "full", "seed0", "model.safetensors")
    weights = [load_file(where / left) for where in (folder, tmp_path / "whole")]
    assert all(
        torch.allclose(weights[0][name], weights[1][name], atol=0 if not launcher else 1e-6)
        for name in weights[0]
    )
