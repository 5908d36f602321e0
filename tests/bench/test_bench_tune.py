"""The benchmark of `greenvis tune` runs what it says and sets each arm against the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from greenvis.bench import tune as bench

ROWS = [
    {"setting": "channels last", "set": ["model.memory_format=channels_last"], "ratio": 0.8,
     "low": 0.7, "high": 0.9},
    {"setting": "as it is", "set": [], "ratio": 1.0, "low": 1.0, "high": 1.0},
]  # fmt: skip


def test_a_run_has_the_settings_that_tuning_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    tuned = {"rows": ROWS, "pick": "channels last", "refused": {"bf16": "slow"}}
    tuned |= {"tuning_j": 1.0, "floor": 1.1}
    monkeypatch.setattr(bench, "tune", lambda path, **more: tuned)
    monkeypatch.setattr(bench, "MODELS", ("timm/resnet10t",))
    real = bench.run_recipe

    def spied(path: Path, *, overrides: list[str], runs: str) -> Any:
        seen.append(overrides)
        return real(path, overrides=overrides, runs=runs)

    monkeypatch.setattr(bench, "run_recipe", spied)
    result = bench.run(tmp_path / "out", side=16, images=16, batch=8, rounds=1)
    assert seen == [["train.seeds=[0]"], ["train.seeds=[0]", "model.memory_format=channels_last"]]
    rows = {row["arm"]: row for row in result["rows"]}
    assert [*rows] == [bench.HAND, bench.RECIPE, bench.TUNED]
    assert (rows[bench.HAND]["vs_hand"], rows[bench.RECIPE]["vs_recipe"]) == (1.0, 1.0)
    assert rows[bench.TUNED]["settings"] == "channels last"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "bf16: left out: slow" in text
    assert "--side 16 --images 16 --batch 8 --rounds 1" in text


def test_ratios_are_within_a_round() -> None:
    done = {
        bench.HAND: [(1.0, 0.5), (2.0, 0.5), (4.0, 0.5)],
        bench.RECIPE: [(0.9, 0.5), (1.8, 0.6), (4.4, 0.7)],
        bench.TUNED: [(0.45, 0.5), (0.9, 0.5), (2.2, 0.5)],
    }
    _, recipe, tuned = bench._rows("m", {"pick": "bf16"}, done)
    assert (recipe["vs_hand"], recipe["vs_recipe"], recipe["accuracy"]) == (0.9, 1.0, 60.0)
    assert (tuned["vs_hand"], tuned["vs_recipe"], tuned["settings"]) == (0.45, 0.5, "bf16")
