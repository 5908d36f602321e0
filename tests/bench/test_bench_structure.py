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
@pytest.mark.parametrize("name", [g.name for g in structure.GROUPS[:4]])
def test_all_networks(name: str) -> None:
    rows = structure.run(groups=[name], rounds=1, side=64, batch=2)["rows"]
    assert all(row["latency_ms"] > 0 for row in rows)
    assert all(row.get("difference", 0) < 0.5 for row in rows)


def test_an_unknown_network() -> None:
    with pytest.raises(BadInput, match="unknown network 'repvgg'"):
        structure.run(groups=["repvgg"])
