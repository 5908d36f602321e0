"""The frontier of plain training: what arms are read against, and never beyond it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from greenvis.meters.labels import labels_line
from greenvis.report import frontier, results
from greenvis.report.frontier import Point, read
from greenvis.report.sections.frontier import Frontier
from greenvis.testing import check_section
from tests import synthetic

FRONT = [Point(10, 0.80), Point(40, 0.90), Point(160, 0.95)]
LINE = frontier.COSTS[frontier.LINE]


def test_energy_is_read_on_its_logarithm_between_neighbours() -> None:
    assert read(FRONT, 0.85) == (pytest.approx(math.sqrt(10 * 40)), False, "")
    assert read(FRONT, 0.90)[0] == pytest.approx(40)
    assert read(FRONT, 0.80) == (10, False, "")


def test_what_another_beats_is_not_on_the_frontier() -> None:
    assert read([*FRONT, Point(100, 0.85)], 0.85) == read(FRONT, 0.85)


def test_nothing_is_read_beyond_the_ends() -> None:
    assert read(FRONT, 0.96) == (None, False, "better than all plain arms")
    assert read(FRONT, 0.70) == (10, True, "")  # the cheapest is better: a bound


def test_the_gain_of_so_many_joules_is_what_they_are_read_at() -> None:
    for energy in (10, 17.0, 40, 90.0, 160):
        joules = read(FRONT, frontier.reached(FRONT, energy))[0]
        assert joules == pytest.approx(energy)
    assert frontier.reached(FRONT, 5) == 0.80  # of the ends, beyond them
    assert frontier.reached(FRONT, 500) == 0.95
    assert frontier.reached([*FRONT, Point(100, 0.85)], 100) == frontier.reached(FRONT, 100)


TECHNIQUE = {"techniques": [{"ema": {}}]}


def study(folder: Path, arms: Mapping[str, tuple[float, float, bool]]) -> Path:
    for arm, (accuracy, cpu_s, plain) in arms.items():
        for seed in range(3):
            synthetic.write(
                folder, arm, seed, accuracy=accuracy + 0.001 * seed, cpu_s=cpu_s * (1 + 0.01 * seed),
                facts={"techniques": [] if plain else TECHNIQUE["techniques"]},
            )  # fmt: skip
    return folder


def test_each_arm_is_read_against_the_plain_ones(tmp_path: Path) -> None:
    content = results(
        study(
            tmp_path,
            {
                "short": (0.80, 100, True),
                "long": (0.90, 400, True),
                "half": (0.85, 100, False),  # of 200 s
                "dear": (0.85, 400, False),
                "worse": (0.70, 200, False),
                "poor": (0.70, 50, False),
                "best": (0.95, 500, False),
            },
        ),
        baseline="long",
    )
    assert set(frontier.plain_arms(content)) == {"short", "long"}
    far = frontier.of_all(content)
    half = far["half"]
    assert half.ratio is not None
    spent = {a: LINE(row).seeds for a, row in content.arms.items()}
    each = [  # half way between their metrics, by seed
        math.log(e / math.sqrt(spent["short"][s] * spent["long"][s]))
        for s, e in spent["half"].items()
    ]
    assert half.ratio.ratio == pytest.approx(math.exp(sum(each) / 3))
    assert (half.ratio.low or 0) < half.ratio.ratio < (half.ratio.high or 0)
    assert half.saves
    assert far["dear"].inside
    worse = far["worse"]
    assert (worse.at_least, worse.inside) == (True, True)
    assert "cheaper and worse" in far["poor"].why
    assert far["best"].why == "better than all plain arms"
    said = {a: frontier.sentence(content, a, d) for a, d in far.items()}
    assert re.match(r"×0\.\S+ \(×.*\): saves$", said["half"])
    assert "inside the frontier" in said["dear"]
    # half of its energy, or what 400 s of plain training reach
    outside = r"; outside it with less than \S+ J, or above 90\.1\s% with as much$"
    assert re.search(outside, said["dear"])
    assert said["best"] == far["best"].why
    section = Frontier()
    value = section.compute(content)
    assert value is not None
    assert any("best is better than every plain arm: +5.00 points" in b for b in value.bullets)
    assert sorted(row[0] for row in value.table.rows) == ["best", "dear", "half", "poor", "worse"]


def test_a_seed_that_its_own_plain_arms_do_not_reach_around_leaves_no_interval(
    tmp_path: Path,
) -> None:
    study(tmp_path, {"short": (0.80, 100, True), "long": (0.90, 400, True)})
    for seed, accuracy in enumerate((0.85, 0.85, 0.795)):  # the last below the cheapest
        synthetic.write(tmp_path, "odd", seed, accuracy=accuracy, cpu_s=100, facts=TECHNIQUE)
    odd = frontier.of_all(results(tmp_path, baseline="long"))["odd"]
    assert odd.ratio is not None
    assert (odd.ratio.low, odd.ratio.high, odd.saves, odd.inside) == (None, None, False, False)


def test_arms_on_other_numbers_of_labels_are_no_frontier(tmp_path: Path) -> None:
    for arm, budget, plain in (("n40", 40, True), ("n80", 80, True), ("clever", 40, False)):
        for seed in range(3):
            path = synthetic.write(
                tmp_path, arm, seed, facts={"techniques": [] if plain else TECHNIQUE["techniques"]}
            )
            with path.open("a") as file:
                line = {"type": "labels", **labels_line("class", budget, "training", "")}
                file.write(json.dumps(line) + "\n")
    assert Frontier().compute(results(tmp_path, baseline="n40")) is None


def test_one_plain_arm_is_no_frontier(tmp_path: Path) -> None:
    two = study(tmp_path, {"long": (0.9, 400, True), "half": (0.85, 100, False)})
    assert Frontier().compute(results(two, baseline="long")) is None


def test_the_section_keeps_the_contract() -> None:
    check_section(Frontier)
