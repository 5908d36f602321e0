"""Labels in reports: hours by kind, the label curve, and the exchange rate, read off and never
beyond."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.meters.labels import images_line, labels_line
from greenvis.meters.record import parse_line
from greenvis.report import label_curve, report, results
from greenvis.report.label_curve import Point, exchange
from greenvis.report.page import to_csv
from greenvis.report.sections.labels import Labels
from greenvis.testing import check_section
from tests import synthetic

CURVE = [Point(40, 0.5, 10), Point(80, 0.6, 11), Point(160, 0.7, 13), Point(320, 0.75, 17)]


def test_the_exchange_rate_is_that_of_its_formula() -> None:
    same, rate, why = exchange(CURVE, Point(40, 0.65, 60.0))
    assert same == pytest.approx(math.sqrt(80 * 160))  # half way, on the logarithm
    assert rate == pytest.approx((60.0 - 12.0) / (math.sqrt(80 * 160) - 40))
    assert why == ""


def test_at_a_measured_point_nothing_is_interpolated() -> None:
    assert exchange(CURVE, Point(40, 0.7, 33.0))[:2] == (
        pytest.approx(160),
        pytest.approx(20 / 120),
    )


def test_less_may_be_better() -> None:
    turned = [p._replace(metric=-p.metric) for p in CURVE]
    assert exchange(turned, Point(40, -0.65, 60.0), -1.0) == exchange(CURVE, Point(40, 0.65, 60.0))


@pytest.mark.parametrize(
    ("point", "why"),
    [
        (Point(40, 0.76, 60.0), "better than all measured"),
        (Point(40, 0.49, 60.0), "worse than all measured"),
        (Point(160, 0.65, 60.0), "spares no label"),
    ],
)
def test_nothing_is_read_off_beyond_the_curve(point: Point, why: str) -> None:
    _, rate, said = exchange(CURVE, point)
    assert rate is None
    assert why in said


def test_a_curve_that_turns_back_says_nothing() -> None:
    bent = [*CURVE, Point(640, 0.55, 20)]
    assert "more than once" in exchange(bent, Point(20, 0.58, 60.0))[2]


def write(
    folder: Path,
    arm: str,
    budget: int,
    accuracy: float,
    cpu_s: float,
    apart: float = 0.001,
    **more: int,
) -> None:
    techniques = [] if arm.startswith("n") else [{"fixmatch": {}}]
    for seed in range(3):
        path = synthetic.write(
            folder, arm, seed, accuracy=accuracy + apart * seed, cpu_s=cpu_s,
            facts={"techniques": techniques, "model": {"ref": "plain/mlp", "options": {}}},
        )  # fmt: skip
        with path.open("a") as file:
            lines = [("labels", labels_line("class", budget, "training", ""))]
            lines += [("images", images_line(role, n, "")) for role, n in more.items()]
            for kind, line in lines:
                file.write(json.dumps({"type": kind, **line}) + "\n")
        assert parse_line(path.read_bytes().splitlines()[-1]) is not None


def curve(folder: Path, budgets: Sequence[int] = (40, 80, 160, 320)) -> Path:
    for i, budget in enumerate(budgets):
        write(folder, f"n{budget}", budget, 0.5 + 0.1 * i, 100 + 10 * i)
    write(folder, "fixmatch", 40, 0.65, 900, unlabelled=960)
    return folder


def test_a_report_reads_the_rate_off_the_arms_on_labels_alone(tmp_path: Path) -> None:
    content = results(curve(tmp_path / "runs"), baseline="n320")
    assert {*label_curve.label_only(content)} == {"n40", "n80", "n160", "n320"}
    worth = label_curve.worth(content, "fixmatch")
    assert worth.why == ""
    assert worth.same == pytest.approx(math.sqrt(80 * 160), rel=1e-3)
    assert worth.rate_j is not None
    assert worth.low is not None
    assert worth.high is not None
    assert worth.low < worth.rate_j < worth.high
    joules = {a: row.train_energy_with_reuse_j.value or 0.0 for a, row in content.rows.items()}
    assert worth.per_point_j == pytest.approx((joules["fixmatch"] - joules["n40"]) / 15)
    text = (report(tmp_path / "runs", out=tmp_path / "out").parent / "report.md").read_text()
    assert "Labels and images" in text
    assert "960 unlabelled" in text
    assert "J per label" in text
    check_section(Labels)


def test_of_several_arms_on_as_many_labels_the_best_is_the_curve_s(tmp_path: Path) -> None:
    runs = curve(tmp_path / "runs")
    alone = label_curve.worth(results(runs, baseline="n320"), "fixmatch")
    write(runs, "n80-short", 80, 0.3, 10)
    assert label_curve.worth(results(runs, baseline="n320"), "fixmatch") == alone
    write(runs, "n80-long", 80, 0.65, 200)
    beside = label_curve.worth(results(runs, baseline="n320"), "fixmatch")
    assert beside.same == pytest.approx(80, rel=1e-2)


def test_more_labels_that_do_no_better_are_no_point_of_the_curve(tmp_path: Path) -> None:
    runs = curve(tmp_path / "runs")
    alone = label_curve.worth(results(runs, baseline="n320"), "fixmatch")
    write(runs, "n640", 640, 0.55, 200)
    assert label_curve.worth(results(runs, baseline="n320"), "fixmatch") == alone


def test_a_seed_off_the_curve_leaves_the_rate_without_an_interval(tmp_path: Path) -> None:
    runs = curve(tmp_path / "runs")
    write(runs, "uneven", 40, 0.75, 900, apart=0.04)  # its third seed is above all of the curve
    worth = label_curve.worth(results(runs, baseline="n320"), "uneven")
    assert worth.rate_j is not None
    assert (worth.same_interval, worth.low, worth.high) == (None, None, None)
    assert worth.why_open.startswith("1 of 3 seeds: it is better than all measured")


def test_where_no_label_may_be_spared_the_rate_has_no_upper_end(tmp_path: Path) -> None:
    runs = curve(tmp_path / "runs")
    write(runs, "uneven", 80, 0.57, 900, apart=0.06)
    content = results(runs, baseline="n320")
    worth = label_curve.worth(content, "uneven")
    assert worth.same_interval is not None
    assert worth.same_interval[0] < 80 < (worth.same or 0) < worth.same_interval[1]
    assert worth.rate_j is not None
    assert worth.low is not None
    assert worth.low < worth.rate_j
    assert worth.high is None
    said = Labels().compute(content)
    assert said is not None
    assert any(row[-1].endswith(" or more)") for row in said.table.rows)
    assert all("none spared" not in row[-1] for row in said.table.rows)
    write(runs, "worse", 80, 0.55, 900)
    said = Labels().compute(results(runs, baseline="n320"))
    assert said is not None
    assert any(row[-1] == "none spared" for row in said.table.rows)


def test_budgets_of_one_recipe_give_the_curve(tmp_path: Path) -> None:
    """Real trainings: `labels` of four arms, and a technique that draws unlabelled images."""
    recipe = tmp_path / "budgets.yaml"
    recipe.write_text(
        "name: budgets\n"
        "data: {name: digits, train: 160, test: 60, unlabeled: rest}\n"
        "model: {ref: plain/mlp, img_size: 8}\n"
        "train: {epochs: 2, batch_size: 20, lr: 0.003, threads: 1, eval_every: 0}\n"
        "meter: {codecarbon: false}\n"
        "arms:\n"
        "  n20: {data: {labels: 20, unlabeled: none}}\n"
        "  n40: {data: {labels: 40, unlabeled: none}}\n"
        "  n80: {data: {labels: 80, unlabeled: none}}\n"
        "  full: {data: {unlabeled: none}}\n"
        "  more: {data: {labels: 20}, techniques: [consistency]}\n"
        "report: {baseline: full}\n"
    )
    content = results(gv.run(recipe, runs=tmp_path / "runs"))
    used = {a: label_curve.used(row) for a, row in content.rows.items()}
    assert used == {"n20": 20, "n40": 40, "n80": 80, "full": 160, "more": 20}
    assert content.arms["more"].images == {"labelled": 20, "unlabelled": 140}
    assert {*label_curve.label_only(content)} == {"n20", "n40", "n80", "full"}
    worth = label_curve.worth(content, "more")
    assert (worth.rate_j is None) == bool(worth.why)
    assert "are needed" not in worth.why


def test_three_budgets_are_too_few(tmp_path: Path) -> None:
    content = results(curve(tmp_path, (40, 80, 160)), baseline="n160")
    worth = label_curve.worth(content, "fixmatch")
    assert worth.rate_j is None
    assert worth.why == "the arms on labels alone have 3 budget(s), and 4 are needed"
    assert worth.per_point_j is not None
    said = Labels().compute(content)
    assert said is not None
    assert any("not read off: fixmatch" in line for line in said.bullets)


def test_seconds_price_an_old_record_in_hours_and_move_no_joule(tmp_path: Path) -> None:
    synthetic.write(tmp_path, "old", facts={"data": {"train": 720, "test": 10}})
    before = results(tmp_path)
    assert Labels().compute(before) is None  # one arm, nobody asked
    after = results(tmp_path, label_seconds=["class=5,10,20"])
    assert label_curve.hours(after.arms["old"], after) == {"low": 1, "central": 2, "high": 4}
    assert after.totals == before.totals
    assert after.arms["old"].train_energy_j == before.arms["old"].train_energy_j
    said = Labels().compute(after)
    assert said is not None
    assert "2 h 00 min (1 h 00 min – 4 h 00 min)" in said.table.rows[0]


def test_results_csv_has_labels_by_purpose_hours_and_images_by_role(tmp_path: Path) -> None:
    found = results(curve(tmp_path), label_seconds=["class=9,36,90"])
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(to_csv(found)))}
    assert float(rows["n40"]["labels_class_training"]) == 40
    assert float(rows["fixmatch"]["images_unlabelled"]) == 960
    assert rows["n40"]["images_unlabelled"] == ""
    hours = [float(rows["n320"][f"label_hours{end}"]) for end in ("_low", "", "_high")]
    assert hours == pytest.approx([0.8, 3.2, 8.0])
