"""`greenvis labels`: suspects of a run, as a list and a sheet, with what they cost."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import greenvis as gv
from greenvis.cli.main import main
from greenvis.meters import record

RECIPE = """
name: noisy
data: {name: digits, train: 300, test: 60, noise: 0.3}
model: {ref: plain/mlp, img_size: 8}
train: {epochs: 6, batch_size: 32, lr: 3.0e-3, seeds: [1]}
arms:
  plain: {}
"""


def test_suspects_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = tmp_path / "r.yaml", tmp_path / "runs"
    file.write_text(RECIPE)
    gv.run(file, runs=runs)
    arguments = ["labels", "run:noisy/plain", "--runs", str(runs), "--folds", "3", "--json"]
    assert main(arguments) == 0
    out = json.loads(capsys.readouterr().out)
    planted = out["planted"]
    assert planted["wrong"] == 90
    assert planted["precision"] > 0.5  # 0.3 at random
    assert planted["recall"] > 0.5
    rows = list(csv.DictReader(Path(out["csv"]).read_text().splitlines()))
    assert len(rows) == out["suspects"]
    assert all(row["label"] != row["suggested"] for row in rows)
    gaps = [float(row["p_suggested"]) - float(row["p_label"]) for row in rows]
    assert gaps == sorted(gaps, reverse=True)
    with Image.open(out["sheet"]) as sheet:
        assert sheet.width == 8 * 112
    assert out["energy_j"]["value"] > 0
    assert out["worth"]["per_look"] > 1
    left = [record.read(path) for path in record.find([runs / "noisy" / "plain-labels"])]
    assert [run.header["arm"] for run in left] == ["plain-labels"]
    assert left[0].facts["label_suspects"] == len(rows)


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["labels", str(tmp_path)]) == 2
    assert "holds no record" in capsys.readouterr().err
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    assert main(["labels", str(file), "--folds", "1"]) == 2
    assert main(["labels", str(file), "--arm", "plane"]) == 2
    assert "plain" in capsys.readouterr().err
