"""Reports speak the metric of the records: its name, its unit, and which way is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from greenvis.errors import BadInput
from greenvis.report import comparison, measures, report, results, stored, terminal, verdict
from greenvis.report.comparing import compare
from greenvis.report.listing import group, ls
from greenvis.tasks.base import Measure
from tests import synthetic

ERROR = Measure("error_px", "px", higher_is_better=False)
TASK = {
    "name": "keypoints",
    "unit": "crop",
    "metrics": [ERROR._asdict(), Measure("within_2px")._asdict()],
}
SEEDS = range(3)


def write(folder: Path, arm: str, error: float, cpu_s: float, **more: Any) -> None:
    for seed in SEEDS:
        facts = {"task": TASK, "error_px": error + 0.01 * seed, "within_2px": 0.9 - error / 10}
        synthetic.write(folder, arm, seed, cpu_s=cpu_s, facts=facts, **more)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write(folder, "baseline", 2.0, 100)
    write(folder, "cheap", 1.5, 50)
    write(folder, "dear", 3.0, 60)
    return folder


def test_further_metrics_and_tests_have_a_table(tmp_path: Path) -> None:
    for seed, error in enumerate((2.0, 3.0)):
        facts = {"task": TASK, "error_px": 1.0, "within_2px": 0.5 + seed / 10}
        tests = {"snow": {"error_px": error, "within_2px": 0.1}}
        synthetic.write(tmp_path / "runs", "plain", seed, facts=facts | {"tests": tests})
    content = results(tmp_path / "runs")
    entries = {(f.metric, f.test): f for f in content.rows["plain"].further}
    assert {key: f.mean for key, f in entries.items()} == pytest.approx(
        {("within_2px", ""): 0.55, ("error_px", "snow"): 2.5}
    )
    assert type(content).from_json(content.as_json()).rows["plain"].further == [*entries.values()]
    page = report(tmp_path / "runs", out=tmp_path / "out")
    text = (page.parent / "report.md").read_text().replace("\\", "").replace("\u00a0", " ")
    assert "| Arm | Within_2px | Error_px on snow |" in text
    assert "| 55.0 % ± 7.1 | 2.50 ± 0.71 px |" in text


def test_what_a_technique_did_once_stands_beside_the_baselines(tmp_path: Path) -> None:
    for seed in SEEDS:
        for arm, seconds in (("baseline", 0.1), ("pixels", 3.0), ("none", None)):
            fact = {"cpu_s": {"clustering": seconds}, "points": 7}
            maker = {"maps": {"points": 7} if seconds is None else fact}
            synthetic.write(tmp_path / "runs", arm, seed, facts=maker)
    content = results(tmp_path / "runs")
    ratio = content.rows["pixels"].ratio("cpu_s of clustering")
    assert ratio is not None
    assert ratio.ratio == pytest.approx(30)
    assert content.rows["none"].ratio("cpu_s of clustering") is None
    page = report(tmp_path / "runs", out=tmp_path / "out")
    text = (page.parent / "report.md").read_text().replace("\\", "").replace("\u00a0", " ")
    assert "| CPU time of clustering | CPU time of clustering ÷ baseline |" in text
    assert "**×30.0**<br>×30.0–30.0 |" in text
    assert "cpu_s of clustering" in (page.parent / "results.csv").read_text().split("\n")[0]


def test_the_primary_metric_is_read_off_the_records(runs: Path) -> None:
    content = results(runs)
    assert content.measure == ERROR
    assert content.lower_is_better
    assert content.margin == 0.0
    assert content.unit == "crop"
    verdicts = {a: row.difference.verdict for a, row in content.rows.items() if row.difference}
    assert verdicts == {"cheap": "keeps", "dear": "loses"}
    stored = content.as_json()
    assert stored["arms"]["cheap"]["error_px"]["mean"] == pytest.approx(1.51)
    assert type(content).from_json(stored).measure == ERROR


def test_a_page_speaks_its_name_and_unit(runs: Path, tmp_path: Path) -> None:
    page = report(runs, out=tmp_path / "out")
    text = (page.parent / "report.md").read_text().replace("\\", "").replace("\u00a0", " ")
    assert "cheap reached 1.51 ± 0.010 px error_px" in text
    assert "error_px −0.500 px" in text
    assert "energy of one crop" in text
    assert "whole interval lies at 0 or below, loses it where the whole interval lies above" in text
    assert "“Keeps”: nothing is lost." in text
    assert ": kept (less is better)" in verdict.sentence(results(runs), "cheap")
    assert ": loses (less is better)" in verdict.sentence(results(runs), "dear")
    assert "than 0" not in text
    assert "accurac" not in text
    drawing = (page.parent / "figures" / "gain-vs-energy.svg").read_text()
    assert "error_px (px, less is better)" in drawing
    assert "lowers the error_px by 0.500 px" in text


def test_a_margin_is_in_the_metrics_own_unit(runs: Path) -> None:
    wide = results(runs, margin=1.5)
    assert wide.rows["dear"].difference.verdict == "keeps"  # type: ignore[union-attr]


def test_another_metric_of_the_task_may_be_asked_for(runs: Path) -> None:
    content = results(runs, metric="within_2px")
    assert content.measure == Measure("within_2px")
    assert content.margin == 0.5
    with pytest.raises(BadInput, match="did you mean 'within_2px'"):
        results(runs, metric="within_3px")


def test_runs_of_two_tasks_are_not_mixed_unasked(runs: Path) -> None:
    synthetic.write(runs, "classes", 0, accuracy=0.5)
    with pytest.raises(BadInput, match=r"accuracy .* error_px .*--metric"):
        results(runs)


def test_runs_are_listed_and_compared_by_it(runs: Path) -> None:
    rows = ls(runs)
    assert {(r["metric"], r["metric_unit"]) for r in rows} == {("error_px", "px")}
    assert ls(runs, sort="-error_px")[0]["arm"] == "dear"
    listed = terminal.rows(rows)
    assert all(r["error_px"].endswith(" px") for r in listed)
    grouped = {r["arm"]: r for r in terminal.rows(group(rows))}
    assert grouped["cheap"]["error_px"] == "1.51 px"
    changes = {r["quantity"]: r for r in compare(runs / "baseline", runs / "cheap")}
    assert terminal.rows([changes["error_px"]])[0]["change"] == "−0.500 px"


def test_names_of_old_records_say_what_they_are() -> None:
    assert measures.named("accuracy") == Measure("accuracy")
    assert measures.is_share(measures.named("recall@1"))
    assert not measures.named("val_loss").higher_is_better
    assert not measures.is_share(measures.named("val_loss"))
    assert measures.written(Measure("recall_1")) == "recall@1"
    assert measures.written(Measure("boundary_miou")) == "boundary mIoU"


@pytest.mark.parametrize(
    ("name", "size"), [("tasks-bags", "100 bags"), ("tasks-segmentation", "images")]
)
def test_a_test_is_of_bags_where_they_are_what_is_answered_for(name: str, size: str) -> None:
    folder = Path(__file__).parents[2] / "reports" / name
    found = stored.read(folder / "results.json")
    assert comparison.tested(found).endswith(size)
    assert f"test of {comparison.tested(found)} ·" in (folder / "report.md").read_text()
