"""Many reports summed up: which arms speak for a technique, what is bold, and where links lead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import synthetic

from greenvis.cli.main import main
from greenvis.errors import BadInput
from greenvis.report import report
from greenvis.report.overview import markdown, overview

REPORTS = Path(__file__).parents[2] / "reports"


def test_an_arm_speaks_for_the_technique_it_adds(tmp_path: Path) -> None:
    found = overview(REPORTS)
    source = json.loads((REPORTS / "quickstart" / "results.json").read_text())
    rows = {
        row["arm"]: row
        for row in found["techniques"]
        if row["measured in"].endswith("quickstart/report.md")
    }
    assert rows.keys() == {"lora", "last1"}  # not `full`, which has no technique, nor the baseline
    change = source["arms"]["lora"]["vs_baseline"]
    assert rows["lora"]["technique"] == "lora"
    assert rows["lora"]["against"] == "scratch" == source["baseline"]
    assert (
        rows["lora"]["metric"]
        .strip("*")
        .startswith(f"{100 * change['accuracy']['mean']:+.2f} points (")
    )
    line = rows["lora"]["energy to train, base and teacher included"]
    assert line.strip("*").startswith(
        f"×{change['train_energy_with_reuse']['ratio']:.3g} ("
    )  # the base is in the first figure
    assert (
        rows["lora"]["own share"].strip("*").startswith(f"×{change['train_energy']['ratio']:.3g} (")
    )
    assert rows["lora"]["differs in"] == "model.init, train.lr"


def _report(
    folder: Path, arms: dict[str, Any], recipe: str, noisy: tuple[str, ...] = ()
) -> dict[str, dict[str, str]]:
    """Write a report of made-up runs, and return the overview's rows by arm."""
    for arm, (techniques, cost) in arms.items():
        for seed in range(4):
            wobble = 40.0 * (seed % 2) if arm in noisy else 0.5 * (seed % 2)
            facts = {"techniques": techniques, "recipe": recipe}
            synthetic.write(
                folder / "runs",
                arm,
                seed,
                accuracy=0.9,
                cpu_s=cost + seed + wobble,
                facts=facts,
                name="study",
            )
    report(folder / "runs", out=folder / "reports" / "study")
    return {row["arm"]: row for row in overview(folder / "reports")["techniques"]}


RECIPE = """\
name: study
model: {ref: a, size: 1}
train: {lr: 1, epochs: 2, seeds: [0]}
arms:
  baseline: {}
  alone: {techniques: [lora], train: {lr: 1, seeds: [0, 1]}}
  rate: {techniques: [lora], train: {lr: 2}}
  start: {techniques: [lora], model: {init: "run:x"}}
  labels: {techniques: [lora], subset: {per_class: 2}}
  two: {techniques: [lora, bitfit]}
"""


def test_an_arm_differs_by_its_technique_alone_only_where_the_recipe_says_so(
    tmp_path: Path,
) -> None:
    arms: dict[str, Any] = {"baseline": ([], 400.0), "two": ([{"lora": {}}, {"bitfit": {}}], 390.0)}
    arms |= {
        arm: ([{"lora": {}}], 390.0) for arm in ("alone", "rate", "start", "labels", "elsewhere")
    }
    rows = _report(tmp_path, arms, RECIPE)
    assert {arm: row["differs in"] for arm, row in rows.items()} == {
        "alone": "the technique alone", "rate": "train.lr", "start": "model.init",
        "labels": "subset",
        "elsewhere": "no recipe at hand",
    }  # fmt: skip


def test_bold_is_what_the_interval_shows_and_no_more(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"baseline": ([], 400.0)}
    arms |= {
        arm: ([{"lora": {}}], cost)
        for arm, cost in (("half", 200.0), ("same", 400.0), ("double", 800.0), ("unsure", 390.0))
    }
    rows = _report(tmp_path, arms, RECIPE, noisy=("unsure",))
    bold = {arm: row["own share"].startswith("**") for arm, row in rows.items()}
    assert bold == {"half": True, "same": False, "double": True, "unsure": False}
    assert not any(row["energy of an image"].startswith("**") for row in rows.values())
    assert not any(row["metric"].startswith("**") for row in rows.values())


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
