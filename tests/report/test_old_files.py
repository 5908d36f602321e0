"""Records, results, recipes, a model file and a delta of before the rooms were built are read, and
give the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import greenvis as gv
from greenvis import models
from greenvis.experiment.jobs import Jobs
from greenvis.experiment.run_folder import DONE_FILE
from greenvis.meters import record
from greenvis.report import archive, report, results

OLD = Path(__file__).parents[1] / "fixtures" / "old"
REPORTS = Path(__file__).parents[2] / "reports"
COMPARING = [
    p.parent
    for p in sorted(REPORTS.glob("*/results.json"))
    if "baseline" in json.loads(p.read_text())
]
RENAMED: dict[str, str] = {}  # keys of results.json: the old name, the new one
DERIVED = {"vs_baseline", "comparisons", "noise_floor", "network"}
ADDED = {
    "further",
    "labels",
    "images",
    "label_seconds",
    "arm",
    "waiting_s",
    "waiting_ram_j",
}  # keys that results have since
IMAGES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)


def _same(old: Any, new: Any, at: str = "") -> list[str]:
    """Return the places of old results whose values new ones do not have."""
    if isinstance(old, dict):
        if not isinstance(new, dict):
            return [at]
        old = {key: value for key, value in old.items() if key in new or key not in ADDED}
        names = {key: RENAMED.get(key, key) for key in old}
        return [
            problem
            for key, value in old.items()
            for problem in (
                _same(value, new[names[key]], f"{at}/{key}")
                if names[key] in new
                else [f"{at}/{key}"]
            )
        ]
    if isinstance(old, list):
        if not isinstance(new, list) or len(old) != len(new):
            return [at]
        pairs = enumerate(zip(old, new, strict=True))
        return [problem for i, (a, b) in pairs for problem in _same(a, b, f"{at}/{i}")]
    if isinstance(old, float) and isinstance(new, (int, float)):
        return [] if math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-15) else [f"{at}: {old} {new}"]
    return [] if old == new else [f"{at}: {old!r} {new!r}"]


@pytest.mark.parametrize("name", ["line", "tasks"])
def test_records_give_the_results_they_gave(name: str, tmp_path: Path) -> None:
    page = report(OLD / name / archive.NAME, out=tmp_path)
    old = json.loads((OLD / name / "results.json").read_text())
    new = json.loads((page.parent / "results.json").read_text())
    old, new = _measured(old), _measured(new)
    assert _same(old, new) == []
    assert _same(new, old) == []


def _measured(content: Any) -> Any:
    """Return results without what rules of today derive otherwise: intervals, and what is equal
    work."""
    if isinstance(content, dict):
        return {k: _measured(v) for k, v in content.items() if k not in DERIVED}
    return content


@pytest.mark.one_in(24)
@pytest.mark.parametrize("folder", COMPARING, ids=lambda folder: folder.name)
def test_a_committed_report_is_written_anew_with_the_same_results(
    folder: Path, tmp_path: Path
) -> None:
    page = report(folder / "results.json", out=tmp_path)
    old = json.loads((folder / "results.json").read_text())
    assert _same(old, json.loads((page.parent / "results.json").read_text())) == []


@pytest.mark.one_in(3)
@pytest.mark.parametrize("folder", COMPARING, ids=lambda folder: folder.name)
def test_a_report_has_records_and_they_give_its_results(folder: Path) -> None:
    old = json.loads((folder / "results.json").read_text())
    options = {key: old[key] for key in ("baseline", "metric", "served", "margin")}
    new = results(folder / archive.NAME, **options).as_json()
    for words in ("title", "note", "arm"):  # who made the report may have given it others
        old[words] = new[words] = None
    assert _same(old, new) == []
    assert _same(new, old) == []


def test_the_comparison_of_results_sees_what_differs() -> None:
    old = {"a": {"b": [1.0, 2.0]}, "c": None}
    assert _same(old, {"a": {"b": [1, 2.0]}, "c": None, "new": 3}) == []
    assert _same(old, {"a": {"b": [1.0, 2.1]}, "c": None}) == ["/a/b/1: 2.0 2.1"]
    assert _same(old, {"a": {"b": [1.0]}}) == ["/a/b", "/c"]


@pytest.mark.parametrize("name", ["line", "tasks"])
def test_finished_runs_are_still_those_of_their_recipe(name: str, tmp_path: Path) -> None:
    with archive.unpacked([OLD / name / archive.NAME]) as folders:
        headers = [record.read(path).header for path in record.find(folders)]
    for h in headers:
        mark = tmp_path / h["name"] / h["arm"] / f"seed{h['seed']}" / DONE_FILE
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"inputs": h["inputs"]}))
    jobs = Jobs(tmp_path).of(gv.load_recipe(OLD / name / "recipe.yaml"))
    assert {(h["arm"], h["seed"]): h["inputs"] for h in headers} == {
        (job.arm.name, job.seed): job.inputs for job in jobs
    }


def test_a_model_file_and_a_delta_answer_as_they_did() -> None:
    answers = json.loads((OLD / "answers.json").read_text())
    model = models.build(f"file:{OLD / 'plain.safetensors'}").eval()
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), torch.tensor(answers["plain"]), atol=1e-5)
    wrapped = gv.wrap(model, [gv.Lora(rank=2)])
    wrapped.load(OLD / "delta")
    with torch.no_grad():
        after = wrapped.model.eval()(IMAGES)
    assert torch.allclose(after, torch.tensor(answers["lora"]), atol=1e-5)
    assert not torch.allclose(after, torch.tensor(answers["plain"]), atol=1e-3)
