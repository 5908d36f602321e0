"""Imports and first calls of a fresh process are a line of their own: in the total, in no arm,
whoever starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.meters import pricing, record
from greenvis.meters.record import STARTUP, Run, find, read

RECIPE = """\
name: twice
data: {name: digits, train: 100, test: 40}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {epochs: 1, batch_size: 20, seeds: [0], threads: 1}
arms: {one: {}, other: {}}
meter: {codecarbon: false}
"""
RAY_WORKER = """
import sys
from pathlib import Path
from greenvis.experiment import on_ray
seen = Path("seen"); seen.touch()
for arm in ("one", "other"):  # both jobs come to the same worker
    on_ray.finish(on_ray.Order(Path("twice.yaml"), (), Path("runs").resolve(), Path("runs/twice").resolve() / arm / "seed0",
                               seen.resolve(), False, ()))
"""
CLI = (
    "import sys; from greenvis.cli.main import main; sys.exit(main(['run', 'twice.yaml', '--out', "
    "'out']))"
)


def runs_of(folder: Path) -> tuple[Run, Run]:
    first, second = sorted(
        (read(p) for p in find([folder / "runs"])), key=lambda r: r.header["clock_s"]
    )
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [pytest.param(RAY_WORKER, id="worker of Ray"), pytest.param(CLI, id="command line")]
)
def test_a_fresh_process_starts_outside_the_arms(tmp_path: Path, program: str) -> None:
    (tmp_path / "twice.yaml").write_text(RECIPE)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        timeout=600,
    )
    first, second = runs_of(tmp_path)
    started = first.sum("cpu_s", STARTUP) or 0.0
    assert started > 1  # torch alone takes as long to import
    assert (second.sum("cpu_s", STARTUP) or 0.0) < started / 4  # at most its own data
    for run in (first, second):
        assert 0 < (run.sum("cpu_s", "setup") or 0.0) < started / 4
    found = _results(tmp_path)
    arms = sum(arm["total_energy_j"]["value"] for arm in found["arms"].values())
    totals = found["totals"]
    assert totals["startup_j"]["value"] == pytest.approx(
        sum(pricing.run_energy(run, STARTUP).value or 0.0 for run in (first, second))
    )
    assert totals["energy_j"]["value"] == pytest.approx(arms + totals["startup_j"]["value"])
    assert all(STARTUP not in arm["energy_by_phase_j"] for arm in found["arms"].values())


def _results(folder: Path) -> dict:
    gv.report([folder / "runs"], out=folder / "page")
    assert "imports, checks, reading data" in (folder / "page" / "report.md").read_text()
    return json.loads((folder / "page" / "results.json").read_text())


def test_a_call_from_a_running_program_books_only_its_own_start(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(RECIPE)
    gv.run(tmp_path / "twice.yaml", runs=tmp_path / "warm")  # whatever was to be imported is
    gv.run(tmp_path / "twice.yaml", runs=tmp_path / "runs")
    first, second = runs_of(tmp_path)
    assert (
        0 < (first.sum("cpu_s", STARTUP) or 0.0) < (first.sum("cpu_s") or 0.0)
    )  # not what this test's process did before
    assert STARTUP not in second.totals


def test_what_an_arm_builds_on_is_charged_without_its_start(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.add(STARTUP, cpu_s=100.0)
        run.add("train", cpu_s=1.0)
    its = record.read(run.path)
    whole, start = (
        pricing.run_energy(its).value or 0.0,
        pricing.run_energy(its, STARTUP).value or 0.0,
    )
    assert 0 < whole < 100 < start
    assert pricing.spent(pricing.observed([[its]])).value == pytest.approx(whole)
