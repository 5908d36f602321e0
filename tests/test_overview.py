"""Many reports summed up: which arms speak for a technique, what is bold, and where links lead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenvis.cli import main
from greenvis.errors import BadInput
from greenvis.report.overview import markdown, overview

REPORTS = Path(__file__).parent.parent / "reports"


def test_an_arm_speaks_for_the_technique_it_adds_alone() -> None:
    found = overview(REPORTS)
    source = json.loads((REPORTS / "quickstart" / "results.json").read_text())
    rows = {row["arm"]: row for row in found["techniques"] if row["measured in"].endswith("quickstart/report.md")}
    assert rows.keys() == {"lora", "last1"}  # not `full`, which has no technique, nor the baseline
    change = source["arms"]["lora"]["vs_baseline"]
    assert rows["lora"]["technique"] == "lora"
    assert rows["lora"]["against"] == "scratch" == source["baseline"]
    assert rows["lora"]["accuracy"].strip("*") == f"{100 * change['accuracy']['mean']:+.2f} points"
    assert rows["lora"]["accuracy"].startswith("**") == (change["accuracy"]["p_adjusted"] < 0.05)
    assert rows["lora"]["energy to train"].strip("*") == f"×{change['train_energy']['ratio']:.3g}"


def test_markdown_links_from_where_it_will_lie(tmp_path: Path) -> None:
    found = overview(REPORTS)
    text = markdown(found, beside=REPORTS)
    assert "[quickstart](quickstart/report.md), against scratch | lora |" in text
    assert "[quickstart](reports/quickstart/report.md)" in markdown(found, beside=REPORTS.parent)


def test_the_command_prints_it(capsys: Any) -> None:
    assert main(["overview", str(REPORTS), "--json"]) == 0
    names = [its["name"] for its in json.loads(capsys.readouterr().out)["reports"]]
    assert names == sorted(p.parent.name for p in REPORTS.glob("*/report.md"))


def test_a_folder_without_reports_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no reports"):
        overview(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "report.md").write_text("# One\n")
    with pytest.raises(BadInput, match=r"no results\.json"):
        overview(tmp_path)
