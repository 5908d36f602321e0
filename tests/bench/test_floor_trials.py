"""The benchmark of the noise floor counts trials against floors that were made without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenvis.bench import floor as bench


def test_trials_are_counted_against_each_floor() -> None:
    ratios = [1.0, 1 / 1.3, 1.1, 1.2]
    rows = [{"trial": i, "ratio": r, "floor": max(r, 1 / r)} for i, r in enumerate(ratios)]
    assert [*bench.counts(rows, 1.15).values()] == ["4 of 4", "1 of 3", "3 of 4", "2 of 4"]


def test_a_trial_reads_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**bench.RECIPE["data"], "train": 64, "test": 32}
    train = {**bench.RECIPE["train"], "epochs": 1}
    monkeypatch.setattr(bench, "RECIPE", {**bench.RECIPE, "data": data, "train": train})
    result = bench.run(tmp_path / "out", trials=2)
    assert result["counts"]["printed in its own report"] == "2 of 2"
    for row in result["rows"]:
        assert row["floor"] == pytest.approx(max(row["ratio"], 1 / row["ratio"]))
    assert "`greenvis bench floor --trials 2" in (tmp_path / "out" / "report.md").read_text()
