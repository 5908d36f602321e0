"""The benchmark of structures measures each setting and writes one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from greenvis.bench import structure
from greenvis.errors import BadInput


def test_measures_a_network_and_writes_it(tmp_path: Path) -> None:
    results = structure.run(tmp_path, groups=["repvgg_a0"], rounds=1, side=32, batch=2)
    branched, folded = results["rows"]
    assert (branched["setting"], folded["setting"]) == ("as it trains", "folded")
    assert folded["gmacs"] < branched["gmacs"]
    assert folded["difference"] < 1e-4
    assert folded["agreement"] == 1
    assert branched["time_ratio"] == 1
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    assert "| repvgg_a0 | folded |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_networks_measured_into_a_folder_stay_in_its_table(tmp_path: Path) -> None:
    mlp = "MLP of DeiT-Ti, 196 tokens"
    for name in ("repvgg_a0", mlp, "repvgg_a0"):
        results = structure.run(tmp_path, groups=[name], rounds=1, side=32, batch=2)
    networks = [row["network"] for row in results["rows"]]
    assert networks == [mlp] * 3 + ["repvgg_a0"] * 2
    other = structure.run(tmp_path, groups=[mlp], rounds=2, side=32, batch=2)
    assert [row["network"] for row in other["rows"]] == [mlp] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [g.name for g in structure.GROUPS[:7]])
def test_all_networks(name: str) -> None:
    rows = structure.run(groups=[name], rounds=1, side=64, batch=2)["rows"]
    assert all(row["latency_ms"] > 0 for row in rows)
    assert all(row.get("difference", 0) < 0.5 for row in rows)


def test_an_unknown_network() -> None:
    with pytest.raises(BadInput, match="unknown network 'repvgg'"):
        structure.run(groups=["repvgg"])
