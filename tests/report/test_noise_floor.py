"""What is smaller than the noise is no saving: arms of equal work, the band of a repeated reading,
the digits it deserves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.meters import pricing
from greenvis.meters.energy import Meter
from greenvis.meters.record_writer import Writer
from greenvis.report import formatting, results
from greenvis.report.estimates import Estimate, Ratio
from greenvis.report.floor import floors
from greenvis.report.shape import Floors, Results

CPU = {
    "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
    "provenance": "estimated",
    "coefficient": {"low": 3.0, "central": 4.0, "high": 6.0},
}  # fmt: skip


def write(
    folder: Path, arm: str, inputs: str, cpu_s: list[float], macs: float = 5.0, image_j: float = 1.0
) -> None:
    for seed, seconds in enumerate(cpu_s):
        head = {
            "run": f"{arm}{seed}",
            "name": "n",
            "arm": arm,
            "seed": seed,
            "inputs": inputs,
            "components": [CPU],
            "baseline": "plain",
        }
        writer = Writer(folder / f"{arm}-{seed}.jsonl", head)
        writer.line("sample", {"phase": "train", "cpu_s": seconds, "wall_s": seconds})
        rounds = [{"samples": 1, "cpu_s": image_j / 4 * (1 + 0.001 * seed), "wall_s": 1.0}] * 3
        served = {"batch_size": 1, "rounds": rounds}
        sizes = {"model": {"ref": "timm/x", "options": {}}, "macs": macs, "params": 10}
        writer.line("fact", {"accuracy": 0.9 + 0.001 * seed, "inference": served, **sizes})
        writer.close("done")


def energies(folder: Path, arm: str) -> dict[str, Ratio | None]:
    versus = results([folder]).arms[arm].vs_baseline
    return versus.ratios if versus else {}


def test_the_same_work_under_two_names_is_no_saving(tmp_path: Path) -> None:
    write(tmp_path, "plain", "same", [20.0, 20.1, 20.2])
    write(tmp_path, "again", "same", [10.0, 10.1, 10.2])  # half as much, at every seed
    found = results([tmp_path]).as_json()["noise_floor"]["training"]
    assert found["ratio"] == pytest.approx(2, rel=0.02)
    assert sorted(found["arms"]) == ["again", "plain"]
    ratios = energies(tmp_path, "again")
    for key in ("train_energy", "total_energy", "train_energy_with_reuse"):
        assert not formatting.shown(ratios[key])
    gv.report([tmp_path], out=tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "no difference shown" in text
    assert "arms that did the same work read apart: training ×1.99" in text


@pytest.mark.parametrize(("third", "shown"), [([18.0, 18.1, 18.2], False), ([2.0, 2.1, 2.2], True)])
def test_the_floor_is_in_every_interval(tmp_path: Path, third: list[float], shown: bool) -> None:
    write(tmp_path, "plain", "same", [20.0, 20.1, 20.2])
    write(tmp_path, "third", "other", third)
    assert formatting.shown(
        energies(tmp_path, "third")["train_energy"]
    )  # nothing yet says how far equal work reads apart
    write(tmp_path, "again", "same", [14.0, 14.1, 14.2])
    assert formatting.shown(energies(tmp_path, "third")["train_energy"]) is shown


def test_equal_networks_give_the_floor_of_serving(tmp_path: Path) -> None:
    write(tmp_path, "plain", "a", [20.0, 20.1], image_j=1.0)
    write(tmp_path, "between", "d", [10.0, 10.1], image_j=0.9)  # the furthest apart count
    write(tmp_path, "other", "b", [10.0, 10.1], image_j=0.8)
    write(tmp_path, "small", "c", [10.0, 10.1], image_j=0.1, macs=1.0)
    floor = results([tmp_path]).as_json()["noise_floor"]
    assert (floor["training"], floor["serving"]["ratio"]) == (None, pytest.approx(1.25))
    assert not formatting.shown(energies(tmp_path, "other")["inference_energy"])
    assert formatting.shown(energies(tmp_path, "small")["inference_energy"])


def test_older_results_tell_networks_apart_by_what_they_count(tmp_path: Path) -> None:
    write(tmp_path, "plain", "a", [20.0, 20.1], image_j=1.0)
    write(tmp_path, "other", "b", [10.0, 10.1], image_j=0.8)
    write(tmp_path, "small", "c", [10.0, 10.1], image_j=0.1, macs=1.0)
    found = results([tmp_path]).as_json()
    for row in found["arms"].values():
        del row["inputs"], row["network"]
    floor = floors(Results.from_json(found))
    assert floor.training is None
    assert floor.serving
    assert floor.serving.ratio == pytest.approx(1.25)
    for row in found["arms"].values():
        row["params"] = None  # nothing says
    assert floors(Results.from_json(found)) == Floors(training=None, serving=None)


def test_no_committed_report_lacks_the_floor_its_arms_give() -> None:
    for path in (Path(__file__).parents[2] / "reports").glob("*/results.json"):
        found = json.loads(path.read_text())
        if "baseline" not in found:
            continue
        finished = [r for r in found["arms"].values() if r["seeds"]]
        networks = [r.get("network", [r["macs"], r["params"]]) for r in finished]
        alike = any(networks.count(n) > 1 for n in networks)
        assert bool(found["noise_floor"]["serving"]) == alike, path
        assert "Noise floor" in (path.parent / "report.md").read_text()


def test_one_seed_gives_no_percentage(tmp_path: Path) -> None:
    write(tmp_path, "plain", "a", [20.0])
    write(tmp_path, "other", "b", [10.0], macs=2.0)
    gv.report([tmp_path], out=tmp_path / "out")
    first = (tmp_path / "out" / "report.md").read_text().partition("## Figures")[0]
    assert "one seed" in first
    assert not re.search(r"(%|times) (less|more)", first)
    assert "Noise floor: not known" in first


def test_a_band_holds_the_same_work_on_another_day(tmp_path: Path) -> None:
    again = {
        c["name"]: c.get("repeatability")
        for c in Meter().components
        if c["source"] in ("cpu-time model", "resident memory model")
    }
    assert all(r["low"] < 1 < r["high"] for r in again.values())
    repeatable = {**CPU, "repeatability": {"low": 0.5, "central": 1.0, "high": 2.0}}
    reading = pricing.energy({"cpu_s": 10.0}, [repeatable])["cpu"]
    assert (reading.low, reading.value, reading.high) == (15.0, 40.0, 120.0)
    old = pricing.energy({"cpu_s": 10.0}, [CPU])["cpu"]  # older records say nothing of it
    assert (old.low, old.value, old.high) == (30.0, 40.0, 60.0)


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        ({"value": 1234.0, "low": 900.0, "high": 1800.0}, "1.2 kJ"),
        ({"value": 1234.0, "low": 1234.0, "high": 1234.0, "std": 40.0}, "1.2 kJ"),
        ({"value": 1234.0, "low": 1234.0, "high": 1234.0, "std": 1.0}, "1.23 kJ"),
        ({"value": None, "low": None, "high": None}, "–"),
    ],
)
def test_figures_have_the_digits_they_deserve(reading: dict, text: str) -> None:
    assert formatting.reading(Estimate(provenance=None, **reading), "J") == text
