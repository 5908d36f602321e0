"""Real processes over gloo: the same weights on one and on two, whatever a technique keeps, and the
way back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis.core import distributed as ranks

SCRIPT = Path(__file__).parents[1] / "two_ranks.py"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# accelerate has no launcher of its own for several CPU processes but by MPI; the script asks for
# the CPU itself
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
"1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
              "0")  # fmt: skip
CASES = ("full fine-tuning", "accumulation", "lora", "adalora", "early exit", "distillation with "
                                                                              "cache", "ewc", "mas",
                                                                              "si",
         "replay", "feature distillation", "resumed")  # fmt: skip


def _run(out: Path, *cases: str, launcher: tuple[str, ...] = ()) -> None:
    started = [
        sys.executable,
        *(["-m", *launcher] if launcher else []),
        str(SCRIPT),
        str(out),
        *cases,
    ]
    done = subprocess.run(
        started,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _left(out: Path, case: str, processes: int) -> list[dict[str, Any]]:
    return [
        torch.load(out / case / f"{processes}-{rank}.pt", weights_only=True)
        for rank in range(processes)
    ]


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return how far two sets of weights are apart: the length of the difference over their
    length."""
    assert sorted(one) == sorted(other)
    assert all(
        torch.equal(t.isinf(), other[n].isinf()) for n, t in one.items()
    )  # thresholds of exits nobody set
    named = [
        n
        for n, t in one.items()
        if t.is_floating_point() and t.isfinite().all() and not n.startswith("regularize.")
    ]
    a, b = (torch.cat([its[n].double().flatten() for n in named]) for its in (one, other))
    return ((a - b).norm() / a.norm()).item()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    _run(folder)
    _run(folder, launcher=TORCHRUN)
    return folder


def test_the_cases_are_those_of_the_script() -> None:
    spec: Any = importlib.util.spec_from_file_location("two_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.CASES) == set(CASES)


def test_one_process_has_nothing_to_share() -> None:
    total = {"a": torch.tensor([2.0])}
    assert (ranks.world_size(), ranks.all_reduce_sum(total, 3)) == (1, 3)
    ranks.all_reduce_mean(total.values())
    assert total["a"].item() == 2.0
    ranks.sync(total.values())
    assert ranks.on_main(lambda: "mine") == "mine"
    assert ranks.average_gradients([torch.nn.Parameter(torch.ones(1))]) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_weights_of_one(out: Path, case: str) -> None:
    (one,) = _left(out, case, 1)
    for its in _left(out, case, 2):
        assert _apart(one, its) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ewc", "mas", "si"])
def test_importances_are_those_of_all_processes_samples(out: Path, case: str) -> None:
    (one,) = _left(out, case, 1)
    first, second = _left(out, case, 2)
    named = [n for n in one if n.startswith("regularize.importance.")]
    assert len(named) > 20
    for name in named:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(
            first[name], one[name], rtol=1e-3, atol=1e-5 * one[name].abs().max().item()
        )


@pytest.mark.slow
def test_a_teacher_is_asked_once_for_each_image_by_all_processes_together(out: Path) -> None:
    for processes in (1, 2):
        for its in _left(out, "distillation with cache", processes):
            assert its["hits and misses"].tolist() == [43, 43]


@pytest.mark.slow
def test_accelerate_launches_them_and_a_run_goes_on_alone(tmp_path: Path, out: Path) -> None:
    _run(tmp_path, "full fine-tuning", "resumed", launcher=ACCELERATE)
    assert (
        _apart(_left(out, "full fine-tuning", 1)[0], _left(tmp_path, "full fine-tuning", 2)[1])
        <= 1e-12
    )
    _run(tmp_path, "resumed")  # the second epoch, after what two processes left of the first
    assert _apart(_left(tmp_path, "resumed", 2)[0], _left(tmp_path, "resumed", 1)[0]) <= 1e-12
