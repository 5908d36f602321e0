"""The benchmark of estimates: errors are held against what is measured, and failures are listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import greenvis as gv
from greenvis.bench import estimate
from greenvis.errors import BadInput
from greenvis.planning import estimate as estimates


def test_errors_are_those_of_the_command_and_failures_are_listed(tmp_path: Path) -> None:
    recipe = {
        "name": "tiny",
        "data": {"name": "digits", "train": 200, "test": 100, "held_out": 60},
        "model": {"ref": "plain/mlp", "img_size": 8},
        "train": {"epochs": 3, "batch_size": 20},
        "arms": {"a": {}},
        "meter": {"codecarbon": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    gv.run(path, runs=tmp_path / "runs")
    folder = str(tmp_path / "runs/tiny/a/seed0")
    result = estimate.run([folder], out=tmp_path / "out")
    every = [shift for shifts in estimate.SHIFTS.values() for shift in shifts]
    assert [row["shift"] for row in result["rows"]] == every
    row = next(row for row in result["rows"] if row["shift"] == "noise:0.1")
    alone = estimates.estimate(folder, "noise:0.1")["measured"]
    assert row["accuracy"] == pytest.approx(100 * alone["accuracy"], abs=0.01)
    for method, error in alone["errors"].items():
        assert row[method] == pytest.approx(100 * error, abs=0.01)
    page = (tmp_path / "out/report.md").read_text()
    failed = {
        row["shift"] for row in result["rows"] if any(abs(row[m]) > 5 for m in estimates.METHODS)
    }
    listed = page.split("## Failures")[1].split("## All")[0]
    assert {line.split()[1] for line in listed.splitlines() if line.startswith("- ")} == failed


def test_a_run_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "name: tiny\ndata: {name: digits, train: 60, test: 20}\n"
        "model: {ref: plain/mlp, img_size: 8}\narms: {a: {}}\nmeter: {codecarbon: false}\n"
    )
    gv.run(path, runs=tmp_path / "runs")
    with pytest.raises(BadInput, match=r"set data\.held_out"):
        estimate.run([str(tmp_path / "runs/tiny/a/seed0")])
