"""A package outside greenvis, really installed, adds to each door; a recipe uses it all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from greenvis.meters import record

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, with_outside: dict[str, str]) -> Path:
    """The folder in which the recipe ran: `runs` and `reports/outside` are in it."""
    folder = tmp_path_factory.mktemp("ran")
    command = [sys.executable, "-m", "greenvis", "run", str(OUTSIDE / "recipe.yaml")]
    env = with_outside | {"CONSTANT_PLUG_W": "60"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def beside(installed: dict[str, str], code: str, **env: str) -> Any:
    """Run a program where the outside package is installed; return the JSON it prints."""
    command = [sys.executable, "-c", "import json, greenvis as gv\n" + code]
    done = subprocess.run(command, env={**installed, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_recipe_uses_what_an_outside_package_adds(ran: Path) -> None:
    results = json.loads((ran / "reports/outside/results.json").read_text())
    plain, gain = results["arms"]["plain"], results["arms"]["gain"]
    assert gain["trainable_params"] == plain["trainable_params"] + 2  # a factor for each class
    assert gain["params"] == plain["params"]  # once merged
    assert results["data"][0]["name"] == "stripes"
    assert gain["techniques"] == [{"gain": {"weight": 0.2}}]
    for path in record.find([ran / "runs"]):
        assert [c["source"] for c in record.read(path).header["components"]] == ["constant_plug"]


def test_an_outside_section_is_on_the_page_and_keeps_the_contract(
    ran: Path, with_outside: dict[str, str]
) -> None:
    html = (ran / "reports/outside/index.html").read_text()
    markdown = (ran / "reports/outside/report.md").read_text()
    assert '<section id="waste"' in html
    assert html.index('id="waste"') < html.index('id="trust"')
    assert "\n## What led to no result\n" in markdown
    assert "| gain | 0 J |" in markdown
    code = (
        "from greenvis.report import sections\n"
        "from greenvis.testing import check_section\n"
        "print(json.dumps(check_section(sections.DOOR.find('waste'))))\n"
    )
    assert beside(with_outside, code) is None


def test_an_outside_technique_keeps_the_contract(with_outside: dict[str, str]) -> None:
    code = (
        "from greenvis.techniques import registry\n"
        "from greenvis.testing import check_technique\n"
        "assert gv.Gain is registry.find('gain')\n"
        "print(json.dumps([[r.outcome, r.reason] for r in check_technique(gv.Gain)]))\n"
    )
    outcomes = beside(with_outside, code)
    assert outcomes
    assert all(outcome == "works" for outcome, _ in outcomes), outcomes


def test_an_outside_data_set_keeps_the_contract(with_outside: dict[str, str]) -> None:
    code = (
        "from greenvis.data.dataset import DOOR\n"
        "from greenvis.testing import check_dataset\n"
        "print(json.dumps([DOOR.names(), check_dataset(DOOR.find('stripes'))]))\n"
    )
    names, result = beside(with_outside, code)
    assert "stripes" in names
    assert result == ["stripes", "works", ""]


def test_an_outside_meter_source_meters_a_run(with_outside: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from greenvis.meters import pricing, record\n"
        f"with gv.track('plug', dir={str(tmp_path)!r}) as run:\n"
        "    time.sleep(0.3)\n"
        "found = record.read(run.path)\n"
        "parts = [dict(r._asdict()) for r in pricing.phases(found)[''].values()]\n"
        "print(json.dumps([run.header['components'], parts, found.totals['']]))\n"
    )
    (plug,), (reading,), totals = beside(with_outside, code, CONSTANT_PLUG_W="60")
    assert (plug["name"], plug["source"], plug["observation"]) == (
        "machine",
        "constant_plug",
        "constant_plug_j",
    )
    assert (reading["method"], reading["provenance"]) == ("constant_plug", "measured")
    assert reading["value"] == pytest.approx(60 * totals["wall_s"])
    assert totals["wall_s"] > 0.3
    components, _, _ = beside(with_outside, code)  # nothing is plugged in: the others go on
    assert "constant_plug" not in [c["source"] for c in components]


def test_an_outside_meter_source_keeps_the_contract_and_doctor_names_it(
    with_outside: dict[str, str],
) -> None:
    code = (
        "from greenvis.meters.doctor import doctor\n"
        "from greenvis.testing import check_meter_source\n"
        "from greenvis_outside.meter import ConstantPlug\n"
        "row = next(r for r in doctor() if r['what'] == 'meter source constant_plug')\n"
        "print(json.dumps([check_meter_source(ConstantPlug), row['source'], row['why']]))\n"
    )
    check, state, _ = beside(with_outside, code, CONSTANT_PLUG_W="60")
    assert (check, state) == ("", "available")
    check, state, why = beside(with_outside, code)
    assert state == "not available"
    assert check == why == "$CONSTANT_PLUG_W names no watts"


def test_an_outside_task_is_trained_and_measured(ran: Path) -> None:
    for path in record.find([ran / "runs/outside"]):
        run = record.read(path)
        assert 0 <= run.facts["accuracy"] <= 1
        assert 0 <= run.facts["recall"] <= 1
        logged = [line for line in run.logs if "recall" in line]
        assert logged[-1]["recall"] == run.facts["recall"]


def test_an_outside_task_keeps_the_contract(with_outside: dict[str, str]) -> None:
    code = (
        "import torch\n"
        "from greenvis.tasks import registry\n"
        "from greenvis.testing import check_task\n"
        "focal = registry.find('focal')\n"
        "check_task(focal)\n"
        "z, y = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))\n"
        "live = gv.wrap(net, gv.Lwf(), task=focal(gamma=1.0))\n"
        "print(json.dumps([focal(gamma=1.0).losses(z, y).tolist(), live.task.name]))\n"
    )
    losses, name = beside(with_outside, code)
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert losses == pytest.approx([(1 - q) * -math.log(q) for q in p], rel=1e-5)
    assert name == "focal"


def test_where_it_is_not_installed_the_recipe_names_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "greenvis", "run", str(OUTSIDE / "recipe.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown" in done.stderr
    assert not (tmp_path / "runs").exists()
