"""A process that works for a training is killed by the system in the middle of it: one clear line,
and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import forked
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
train: {epochs: 2, batch_size: 8, eval_every: 0, workers: WORKERS}
meter: {codecarbon: false}
arms: {full: {}}
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


class Launched:
    """The recipe below a launcher; what it says goes to a file, for nobody reads along."""

    def __init__(self, folder: Path, launcher: Sequence[str], words: Sequence[str]) -> None:
        self._file = folder / "said"
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, "-m", "greenvis", *words]
        with self._file.open("w") as said:
            self._process = subprocess.Popen(command, cwd=folder, env=env, stdout=said, stderr=said)
        self.pid = self._process.pid

    @property
    def stderr(self) -> str:
        """What it has said."""
        return self._file.read_text()

    def wait(self, seconds: float = forked.HANGS_S) -> int | None:
        """Return its exit code once it has one, or None after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode


def start(folder: Path, launcher: Sequence[str], every_s: float) -> Launched | forked.Greenvis:
    """Start the recipe there, with a checkpoint every so many seconds."""
    words = ("run", "tiny.yaml", "--set", f"train.checkpoint_every_s={every_s}")
    if launcher:
        return Launched(folder, launcher, words)
    return forked.Greenvis(*words, cwd=folder)


def children(pid: int) -> list[psutil.Process]:
    """Return the processes below that one, or none once it has ended itself."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


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
    process = start(folder, launcher, 1e-9)
    while not list((folder / "runs").rglob("*checkpoint.pt")):
        assert process.wait(0.02) is None, process.stderr
    while process.wait(0.02) is None:  # a worker that was just about to end is followed by another
        for child in children(process.pid):
            with suppress(psutil.NoSuchProcess):
                if not launcher or child.environ().get("RANK") == victim[-1]:
                    child.kill()
    said = process.stderr
    ours = [line for line in said.splitlines() if line.startswith("greenvis: ")]
    assert process.wait() == 1
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
        again = start(where, launcher, 60)
        assert again.wait() == 0, again.stderr
    notes = [note for path in record.find([folder / "runs"]) for note in record.read(path).notes]
    assert any(note.startswith("resumed at epoch") for note in notes)
    left = Path("runs", "tiny", "full", "seed0", "model.safetensors")
    weights = [load_file(where / left) for where in (folder, tmp_path / "whole")]
    assert all(
        torch.allclose(weights[0][name], weights[1][name], atol=0 if not launcher else 1e-6)
        for name in weights[0]
    )
