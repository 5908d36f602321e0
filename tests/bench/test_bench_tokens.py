"""The benchmark of token merging measures every setting, in turn, and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from greenvis.bench import tokens


@pytest.mark.slow
def test_measures_each_setting_and_writes_it(tmp_path: Path) -> None:
    found = tokens.run(
        tmp_path, "timm/vit_tiny_patch16_224", schedules=(0, (16, -1)), batches=(1, 2), rounds=2
    )
    assert [(row["batch"], row["r"]) for row in found["rows"]] == [
        (n, r) for n in (1, 2) for r in ("unmodified", "0", "(16, -1)")
    ]
    rows = {row["r"]: row for row in found["rows"] if row["batch"] == 2}
    assert rows["unmodified"]["speedup"] == rows["0"]["flops_ratio"] == 1
    assert 2 < rows["(16, -1)"]["flops_ratio"] < 3
    assert all(row["images_per_s"] > 0 and row["energy_j"] > 0 for row in found["rows"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == found["rows"]
    assert "| 2 | (16, -1) |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "tokens.svg").read_text().lstrip().startswith("<?xml")
