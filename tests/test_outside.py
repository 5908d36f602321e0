"""A package outside greenvis, really installed, adds to each door; a recipe uses it all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import greenvis

from greenvis.meters import record

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, with_outside: dict[str, str]) -> Path:
    """The folder in which `outside_checks.py` ran where the outside package is installed: `runs`
    and `reports/outside` of its recipe are in it, and the answers."""
    folder = tmp_path_factory.mktemp("ran")
    command = [sys.executable, str(OUTSIDE.with_name("outside_checks.py"))]
    command += [str(OUTSIDE / "recipe.yaml"), str(tmp_path_factory.mktemp("metered"))]
    done = subprocess.run(
        command, cwd=folder, env=with_outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def checks(ran: Path) -> Any:
    """The answers of `outside_checks.py`."""
    return json.loads((ran / "answers.json").read_text())


def test_a_recipe_uses_what_an_outside_package_adds(ran: Path) -> None:
    results = json.loads((ran / "reports/outside/results.json").read_text())
    plain, gain = results["arms"]["plain"], results["arms"]["gain"]
    assert gain["trainable_params"] == plain["trainable_params"] + 2  # a factor for each class
    assert gain["params"] == plain["params"]  # once merged
    assert results["data"][0]["name"] == "stripes"
    assert gain["techniques"] == [{"gain": {"weight": 0.2}}]
    for path in record.find([ran / "runs"]):
        assert [c["source"] for c in record.read(path).header["components"]] == ["constant_plug"]


def test_an_outside_section_is_on_the_page_and_keeps_the_contract(ran: Path, checks: Any) -> None:
    html = (ran / "reports/outside/index.html").read_text()
    markdown = (ran / "reports/outside/report.md").read_text()
    assert '<section id="waste"' in html
    assert html.index('id="waste"') < html.index('id="trust"')
    assert "\n## What led to no result\n" in markdown
    assert "| gain | 0 J |" in markdown
    assert checks["section"] is None


def test_an_outside_technique_keeps_the_contract(checks: Any) -> None:
    assert checks["technique"]
    assert all(outcome == "works" for outcome, _ in checks["technique"]), checks["technique"]


def test_an_outside_data_set_keeps_the_contract(checks: Any) -> None:
    names, result = checks["data_set"]
    assert "stripes" in names
    assert result == ["stripes", "works", ""]


def test_an_outside_meter_source_meters_a_run(checks: Any) -> None:
    (plug,), (reading,), totals = checks["metered"]
    assert (plug["name"], plug["source"], plug["observation"]) == (
        "machine",
        "constant_plug",
        "constant_plug_j",
    )
    assert (reading["method"], reading["provenance"]) == ("constant_plug", "measured")
    assert reading["value"] == pytest.approx(60 * totals["wall_s"])
    assert totals["wall_s"] > 0.3
    components, _, _ = checks["metered, unplugged"]  # nothing is plugged in: the others go on
    assert "constant_plug" not in [c["source"] for c in components]


def test_an_outside_meter_source_keeps_the_contract_and_doctor_names_it(checks: Any) -> None:
    check, state, _ = checks["meter_source"]
    assert (check, state) == ("", "available")
    check, state, why = checks["meter_source, unplugged"]
    assert state == "not available"
    assert check == why == "$CONSTANT_PLUG_W names no watts"


def test_an_outside_task_is_trained_and_measured(ran: Path) -> None:
    for path in record.find([ran / "runs/outside"]):
        run = record.read(path)
        assert 0 <= run.facts["accuracy"] <= 1
        assert 0 <= run.facts["recall"] <= 1
        logged = [line for line in run.logs if "recall" in line]
        assert logged[-1]["recall"] == run.facts["recall"]


def test_an_outside_task_keeps_the_contract(checks: Any) -> None:
    losses, name = checks["task"]
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert losses == pytest.approx([(1 - q) * -math.log(q) for q in p], rel=1e-5)
    assert name == "focal"


def test_where_it_is_not_installed_the_recipe_names_what_is_missing(tmp_path: Path) -> None:
    done = greenvis("run", str(OUTSIDE / "recipe.yaml"), cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown" in done.stderr
    assert not (tmp_path / "runs").exists()
