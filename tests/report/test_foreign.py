"""Exports of other tools as arms: codecarbon, MLflow, Weights & Biases; what is none says why."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from greenvis.errors import BadInput
from greenvis.report import report, results

KWH = 3.6e6


def _table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def emissions(tmp_path: Path) -> Path:
    """As codecarbon's file handler writes it."""
    rows = [
        {
            "timestamp": f"2026-01-0{1 + i}T10:00:00", "project_name": project,
            "run_id": f"{project}{i}", "duration": 60.0 + i, "emissions": 0.05 * kwh,
            "cpu_power": 42.5, "cpu_energy": kwh / 2, "gpu_energy": 0.0, "ram_energy": kwh / 2,
            "energy_consumed": kwh, "country_name": "France", "country_iso_code": "FRA",
            "cpu_model": "AMD EPYC", "gpu_model": "", "codecarbon_version": "3.0.1",
        }
        for project, kwh in (("full", 0.002), ("lora", 0.001))
        for i in range(3)
    ]  # fmt: skip
    return _table(tmp_path / "emissions.csv", rows)


def test_codecarbons_rows_are_runs_of_arms(emissions: Path, tmp_path: Path) -> None:
    content = results(emissions, baseline="full")
    assert content.order == ["full", "lora"]
    assert content.arms["lora"].train_energy_j.value == pytest.approx(0.001 * KWH)
    assert content.arms["lora"].carbon_g.value == pytest.approx(0.05)
    assert content.arms["full"].seeds == [0, 1, 2]
    ratio = content.arms["lora"].ratio("train_energy")
    assert ratio is not None
    assert ratio.ratio == pytest.approx(0.5)
    assert [g["zone"] for g in content.carbon_intensity] == ["FRA"]
    assert content.environment.cpu == [{"name": "AMD EPYC"}]
    page = report(emissions, out=tmp_path / "out", baseline="full")
    assert "as codecarbon recorded it" in (page.parent / "report.md").read_text()
    again = results(page.parent, baseline="full")  # from the records packed beside it
    assert again.arms["lora"].train_energy_j == content.arms["lora"].train_energy_j


def test_mlflows_table_and_its_json_give_the_same(tmp_path: Path) -> None:
    rows = [
        {
            "run_id": f"r{arm}{seed}", "experiment_id": "1", "status": "FINISHED",
            "start_time": 1_760_000_000_000 + seed, "metrics.accuracy": 0.9 + 0.01 * seed,
            "metrics.energy_kwh": kwh, "params.seed": seed, "params.lr": 0.1,
            "tags.mlflow.runName": f"{arm}-seed{seed}",
        }
        for arm, kwh in (("baseline", 0.4), ("pruned", 0.1))
        for seed in range(2)
    ]  # fmt: skip
    table = results(_table(tmp_path / "runs.csv", rows))
    nested = [
        {
            "info": {k: row[k] for k in ("run_id", "experiment_id", "status", "start_time")},
            "data": {
                part: [
                    {"key": k.removeprefix(f"{part}."), "value": v}
                    for k, v in row.items()
                    if k.startswith(f"{part}.")
                ]
                for part in ("metrics", "params", "tags")
            },
        }
        for row in rows
    ]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"runs": nested}))
    of_json = results(file)
    for content in (table, of_json):
        assert content.order == ["baseline", "pruned"]
        assert content.arms["pruned"].gain.by_seed == {"0": 0.9, "1": 0.91}
        assert content.arms["pruned"].train_energy_j.value == pytest.approx(0.1 * KWH)


def test_weights_and_biases_runs_in_per_cent_that_crashed_or_not(tmp_path: Path) -> None:
    rows = [
        {"Name": "tiny", "State": "finished", "ID": "a", "seed": 0, "accuracy": 91.0,
         "energy_j": 500},
        {"Name": "tiny", "State": "finished", "ID": "b", "seed": 1, "accuracy": 92.0,
         "energy_j": 510},
        {"Name": "tiny", "State": "crashed", "ID": "c", "seed": 2, "accuracy": "", "energy_j": 90},
    ]  # fmt: skip
    content = results(_table(tmp_path / "wandb.csv", rows))
    assert content.arms["tiny"].gain.mean == pytest.approx(0.915)
    assert content.arms["tiny"].status == "partly done"
    assert content.totals.energy_j.value == pytest.approx(1100)
    runs = [
        {"name": "tiny", "state": "finished", "config": {"seed": s, "arm": "small"},
         "summary": {"val_loss": 0.3 + s, "energy_consumed": 0.001, "_runtime": 12.0}}
        for s in range(2)
    ]  # fmt: skip
    (tmp_path / "wandb.json").write_text(json.dumps(runs))
    content = results(tmp_path / "wandb.json", metric="val_loss")
    assert content.arms["small"].gain.mean == pytest.approx(0.8)
    assert content.arms["small"].wall_s == 12.0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "run_id,status,metrics.accuracy\n1,FINISHED,0.9\n", "no column of energy"),
        ("a.csv", "project_name,energy_consumed\n", "holds no run"),
        ("a.csv", "", "holds no run"),
        ("a.json", "[1, 2]", "list of runs"),
        ("a.json", '{"runs": {}}', "list of runs"),
        ("a.json", "[{", "a.json"),
        ("a.csv", "project_name,energy_consumed\na,nan\n", "a.csv"),
    ],
)
def test_what_is_no_export_says_what_it_lacks(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    if "nan" in text:  # a run without a readable energy is a run whose energy is not known
        assert results(tmp_path / name).arms["a"].train_energy_j.value is None
        return
    with pytest.raises(BadInput, match=words):
        results(tmp_path / name)


def test_hostile_cells_stay_text(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script>\x1b[31m "x"'
    rows = [{"project_name": nasty, "energy_consumed": 1e300, "duration": -5, "accuracy": 1e9}]
    rows += [{"project_name": nasty, "energy_consumed": 0.1, "duration": "x", "accuracy": "inf"}]
    page = report(_table(tmp_path / "e.csv", rows), out=tmp_path / "out")
    assert "<script>alert" not in page.read_text()
