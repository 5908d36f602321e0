"""A changed coefficient re-prices everything: training, serving, settings, ancestors, tasks, a
weight file's card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import greenvis as gv
from greenvis.experiment import lineage
from greenvis.meters import pricing, record
from greenvis.report import results

HEAD = """\
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {epochs: 1, batch_size: 20, seeds: [0], threads: 1}
meter: {codecarbon: false}
"""
RECIPES = {
    "line": HEAD
    + """\
data: {name: digits, train: 120, test: 60, held_out: 40}
arms:
  teacher: {}
  student: {techniques: [{distill: {teacher: "run:teacher"}}]}
  exits: {techniques: [{early_exit: {at: [0.5]}}]}
""",
    "tasks": HEAD
    + """\
data: {name: digits, train: 120, test: 60, stream: {kind: class, tasks: 5}}
arms: {plain: {}}
""",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}")
        gv.run(folder / f"{name}.yaml", runs=folder / "runs")
    return folder


def again(folder: Path, to: Path, factor: float) -> Path:
    """Copy the records with every coefficient times `factor`."""
    shutil.copytree(
        folder / "runs", to, ignore=shutil.ignore_patterns("*.safetensors", "*.json", ".cache")
    )
    for path in record.find([to]):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for component in line.get("components", ()) if line["type"] == "header" else ():
                for bound in ("low", "central", "high"):
                    component["coefficient"][bound] *= factor
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return to


def exits(found: dict[str, Any]) -> float:
    return found["arms"]["exits"]["operating_points"][0]["inference_energy_j"]


@pytest.mark.parametrize(
    ("recipe", "of"),
    [
        ("line", lambda r: r["arms"]["student"]["train_energy_j"]["value"]),
        ("line", lambda r: r["arms"]["student"]["inference_energy_j"]["value"]),
        ("line", lambda r: r["arms"]["student"]["inference_energy_j"]["high"]),
        ("line", exits),
        ("line", lambda r: r["arms"]["student"]["uses"][0]["energy_j"]["value"]),
        ("line", lambda r: r["arms"]["student"]["base_reuse"]["whole_j"]["low"]),
        ("tasks", lambda r: r["arms"]["plain"]["continual"]["task_energy_j"]["mean"]),
        ("tasks", lambda r: r["totals"]["energy_j"]["value"]),
    ],
)
def test_what_costs_three_times_as_much_reads_three_times_as_much(
    finished: Path, tmp_path: Path, recipe: str, of: Callable[[dict[str, Any]], float]
) -> None:
    before = of(results([finished / "runs" / recipe]).as_json())
    after = of(results([again(finished, tmp_path / "runs", 3.0) / recipe]).as_json())
    assert before > 0
    assert after == pytest.approx(3 * before)


def numbers(value: Any) -> list[float]:
    """Return all numbers in a value of JSON, in order."""
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [value] if isinstance(value, (int, float)) else []


def test_a_coefficients_file_prices_records_made_before_it(finished: Path, tmp_path: Path) -> None:
    """Training, serving, settings, tasks and ancestors alike, as if it had been recorded."""
    header = record.read(next(record.find([finished / "runs"]))).header
    own = {c["observation"]: c["coefficient"] for c in header["components"]}
    keys = {"cpu_s": "cpu_w_per_busy_cpu", "ram_gb_s": "ram_w_per_gb"}
    bounds = ("low", "central", "high")
    file = tmp_path / "mine.json"
    content = {key: {b: 3 * own[q][b] for b in bounds} for q, key in keys.items()}
    file.write_text(json.dumps(content))
    for name in RECIPES:
        here = results([finished / "runs" / name], coefficients=file).as_json()
        there = results([again(finished, tmp_path / name, 3.0) / name]).as_json()
        before = results([finished / "runs" / name]).as_json()
        for label, row in here["arms"].items():
            other, old = there["arms"][label], before["arms"][label]
            for key in ("train_energy_j", "inference_energy_j", "train_energy_with_reuse_j"):
                assert row[key]["value"] == pytest.approx(other[key]["value"])
                assert row[key]["high"] == pytest.approx(other[key]["high"])
                assert row[key]["value"] == pytest.approx(3 * old[key]["value"])
            for key in ("operating_points", "uses", "continual"):
                assert numbers(row.get(key)) == pytest.approx(numbers(other.get(key)))
        assert any("mine.json" in s["citation"] for s in here["sources"])


def test_what_a_file_does_not_name_stays(finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"ram_w_per_gb": {"low": 1, "central": 1, "high": 1}}')
    parts = [
        results([finished / "runs" / "line"], **options).arms["student"].energy_by_component_j
        for options in ({}, {"coefficients": file})
    ]
    assert parts[0]["cpu"] == parts[1]["cpu"]
    assert parts[0]["ram"].value != parts[1]["ram"].value


def test_joules_that_an_old_record_holds_keep_and_say_so(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.fact(accuracy=0.5, inference_energy_j={"value": 2.0})
    file = tmp_path / "mine.json"
    file.write_text('{"cpu_w_per_busy_cpu": {"low": 1, "central": 1, "high": 1}}')
    content = results([run.path], coefficients=file)
    assert content.arms["t"].inference_energy_j.value == 2.0
    assert any("holds joules of inference_energy_j" in note for note in content.notes)


def test_ratios_of_settings_and_their_spread_stay(finished: Path, tmp_path: Path) -> None:
    both = [
        results([folder / "line"]).as_json()
        for folder in (finished / "runs", again(finished, tmp_path / "runs", 3.0))
    ]
    one, other = (
        [(p["energy_ratio"], p["energy_spread"]) for p in r["arms"]["exits"]["operating_points"]]
        for r in both
    )
    assert [x for pair in one for x in pair] == pytest.approx([x for pair in other for x in pair])


def test_no_joules_are_stored(finished: Path) -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {k for v in value.values() for k in keys(v)}
        return {k for v in value for k in keys(v)} if isinstance(value, list) else set()

    for path in record.find([finished / "runs"]):
        run = record.read(path)
        assert not {k for k in keys([run.facts, run.uses]) if k.endswith("energy_j")}
        assert not {
            k
            for k in keys(run.facts)
            if k.endswith("_j") and not k.startswith(("cpu", "dram", "gpu", "meter"))
        }


def test_an_ancestor_metered_otherwise_keeps_its_own_coefficients(tmp_path: Path) -> None:
    other = {
        "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
        "provenance": "estimated",
        "coefficient": {"low": 20.0, "central": 20.0, "high": 20.0},
    }  # fmt: skip
    with gv.track("t", dir=tmp_path) as run:
        run.uses(
            "base", "elsewhere", ["r"], observed=[{"components": [other], "totals": {"cpu_s": 3.0}}]
        )
    assert pricing.uses(record.read(run.path))[0]["energy_j"]["value"] == 60.0


def test_old_lines_with_joules_read_as_they_did(tmp_path: Path) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.uses("base", "old", ["r"], pricing.Reading("energy_j", 5.0, 4.0, 6.0))
        run.fact(accuracy=0.5, inference_energy_j={"value": 2.0, "spread": 0.1})
    arm = results([run.path]).as_json()["arms"]["t"]
    assert arm["uses"][0]["energy_j"] == {
        "value": 5.0,
        "low": 4.0,
        "high": 6.0,
        "provenance": "estimated",
    }
    assert arm["inference_energy_j"]["value"] == 2.0


def test_a_card_holds_observations_and_an_old_one_still_reads(finished: Path) -> None:
    card = lineage.read_card(finished / "runs/line/student/seed0")
    assert card["observed"][0]["totals"]["cpu_s"] > 0
    assert card["energy_j"]["value"] == pytest.approx(pricing.spent(card["observed"]).value)
    parts = [card["energy_j"]["value"], *(use["energy_j"]["value"] for use in card["uses"])]
    assert card["total_j"]["value"] == pytest.approx(sum(parts))
    old = {"value": 1.0, "low": 1.0, "high": 1.0, "provenance": "estimated"}
    assert lineage._priced({"energy_j": old})["energy_j"] == old


@pytest.mark.parametrize(
    "facts",
    [
        {"inference": {"rounds": [{"samples": "many", "cpu_s": 1.0}]}},
        {"inference": {"rounds": 3}},
        {"inference": {"rounds": [{"samples": 0, "cpu_s": 1.0}]}},
        {"operating_points": [{"setting": "never", "passes": [3, None]}]},
        {
            "operating_points": [
                {"setting": "never", "images": 5, "passes": [{}]},
                {"setting": "b", "images": 5, "passes": []},
            ]
        },
        {"task_observed": [None, "x", {"cpu_s": "1"}]},
    ],
)
def test_observations_of_other_hands_are_unknown_and_no_crash(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    with gv.track("t", dir=tmp_path) as run:
        run.fact(accuracy=0.5, **facts)
        run.uses("base", "b", ["r"], observed=[])
    found = results([run.path]).as_json()["arms"]["t"]
    assert found["inference_energy_j"]["value"] is None
    assert found["uses"][0]["energy_j"]["value"] is None
