"""Latency and peak memory of known work."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from greenvis.errors import BadInput
from greenvis.meters import speed
from greenvis.meters.speed import in_turn, latency


class Sleepy(nn.Module):
    """Takes 5 ms a call and 1 ms an image, by the clock below."""

    now = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Sleepy.now += 0.005 + 0.001 * len(x)
        return self.norm(x)


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only a call of the model moves, whatever else the machine does."""
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: Sleepy.now))


@pytest.mark.usefixtures("_clock")
def test_latency_is_the_calls_time_and_leaves_the_model_alone() -> None:
    model = Sleepy().train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    found = latency(model, torch.randn(5, 3), seconds=0.3)
    assert found["p50"] == found["p95"] == pytest.approx(10.0)
    assert (found["batch_size"], found["calls"]) == (5, pytest.approx(30, abs=1))
    assert model.training
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.tensor(1.0), "x"])
def test_an_empty_batch_is_refused(x: object) -> None:
    with pytest.raises(BadInput):
        latency(Sleepy(), x)


FREED = """
import mmap, os
from greenvis.meters.memory import peak_mb, reset_peak
reset_peak()
before = peak_mb()
block = mmap.mmap(-1, 300_000_000)  # of its own pages: the allocator may hold freed ones, resident already
for _ in range(300):  # in pieces: a whole copy beside it would be measured as well
    block.write(os.urandom(1000) * 1000)
block.close()
assert 280 < peak_mb() - before < 330, (before, peak_mb())
reset_peak()
assert peak_mb() < before + 100, (before, peak_mb())
"""


def test_peak_memory_sees_what_was_freed_again_until_it_is_reset() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FREED], capture_output=True, text=True, check=False
    )  # other tests' pages move
    assert done.returncode == 0, done.stderr


def test_turns_turn_around_every_other_round() -> None:
    assert [in_turn("abc", number) for number in range(3)] == [[*"abc"], [*"cba"], [*"abc"]]
