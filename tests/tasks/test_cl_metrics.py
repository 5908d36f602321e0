"""The metrics of continual learning against three libraries' values, and what a report makes of
them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic

from greenvis.report import report, results
from greenvis.report.drawings import tasks
from greenvis.tasks import continual as cl

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "cl_metrics.json").read_text())
MATRIX = FIXTURE["accuracy_matrix"]


def test_they_equal_each_librarys() -> None:
    assert cl.average_accuracy(MATRIX) == pytest.approx(FIXTURE["average_final_accuracy"])
    assert cl.average_incremental_accuracy(MATRIX) == pytest.approx(
        FIXTURE["average_incremental_accuracy"]
    )
    its = FIXTURE["avalanche"]
    assert cl.forgetting_by_task(MATRIX, "first") == pytest.approx(
        list(its["forgetting_per_exp"].values())
    )
    assert cl.forgetting(MATRIX, "first") == pytest.approx(its["stream_forgetting"])
    assert cl.backward_transfer(MATRIX) == pytest.approx(its["stream_bwt"])
    its = FIXTURE["mammoth"]
    assert cl.forgetting(MATRIX) == pytest.approx(its["forgetting_full_matrix"])
    assert cl.forgetting(MATRIX) == pytest.approx(FIXTURE["l2p_pytorch"]["forgetting"])
    assert cl.backward_transfer(MATRIX) == pytest.approx(its["backward_transfer"])
    untrained = [row[0] for row in FIXTURE["random_baseline"]]
    assert cl.forward_transfer(MATRIX, untrained) == pytest.approx(its["forward_transfer"])


def test_the_others_by_their_formula() -> None:
    assert cl.plasticity(MATRIX) == pytest.approx((0.98 + 0.95 + 0.93 + 0.99 + 0.97) / 5)
    assert cl.averages(MATRIX)[1] == pytest.approx((0.71 + 0.95) / 2)
    assert cl.joules_per_task([1.0, 2.0, 6.0]) == 3.0
    assert cl.energy_normalised_accuracy(MATRIX, 2000.0) == pytest.approx(66.8 / 2)


HELPED = [
    [0.9, 0.3, 0.1],
    [0.7, 0.8, 0.2],
    [0.95, 0.85, 0.6],
]  # the last task helped both before it


def test_forgetting_is_negative_where_the_last_task_helped() -> None:
    """Chaudhry's best is of before the last task: 0.9 and 0.8. One that counts the last, as
    mammoth's, is never negative."""
    assert cl.forgetting_by_task(HELPED) == pytest.approx([0.9 - 0.95, 0.8 - 0.85])
    assert cl.forgetting(HELPED) == pytest.approx(-0.05)
    best = [max(row[i] for row in HELPED) - HELPED[-1][i] for i in range(2)]
    assert best == [0, 0]
    assert cl.forgetting_by_task([[0.5, 0.9], [0.4, 0.6]]) == pytest.approx(
        [0.1]
    )  # one task: the last is no part of it
    assert cl.forgetting_by_task([[0.2, 0.9, 0.0], [0.2, 0.4, 0.0], [0.2, 0.3, 0.5]])[
        1
    ] == pytest.approx(0.1)  # once learned


@pytest.mark.parametrize(
    "matrix",
    [HELPED, [[0.6, 0.0], [0.8, 0.7]], [[0.5, 0.1, 0.0], [0.4, 0.9, 0.2], [0.45, 0.7, 0.3]]],
)
def test_first_is_avalanche_s_also_where_tasks_gain(matrix: list[list[float]]) -> None:
    """Accuracy when learned less the last, a mean over the tasks before the last; what tasks gained
    counts against it."""
    lost = [matrix[i][i] - matrix[-1][i] for i in range(len(matrix) - 1)]
    assert cl.forgetting_by_task(matrix, "first") == pytest.approx(lost)
    assert cl.forgetting(matrix, "first") == pytest.approx(sum(lost) / len(lost))
    assert cl.backward_transfer(matrix) == pytest.approx(-sum(lost) / len(lost))


def test_what_was_not_measured_is_none() -> None:
    joint = [[None, None], [0.8, 0.9]]
    assert cl.average_accuracy(joint) == pytest.approx(0.85)
    for metric in (
        cl.forgetting,
        cl.plasticity,
        cl.backward_transfer,
        cl.average_incremental_accuracy,
    ):
        assert metric(joint) is None
    assert cl.forgetting([[0.9]]) is None
    assert cl.joules_per_task([None, 2.0]) is None
    assert cl.energy_normalised_accuracy(joint, 0.0) is None


def test_the_report_shows_them(tmp_path: Path) -> None:
    low = [[v - 0.02 for v in row] for row in MATRIX]
    for seed, matrix in enumerate((MATRIX, low)):
        facts = {"task_accuracy": matrix, "task_energy_j": [2.0] * 5, "buffer_bytes": 1000}
        synthetic.write(tmp_path, "er", seed, accuracy=matrix[-1][0], facts=facts)
        synthetic.write(tmp_path, "baseline", seed, accuracy=0.5)
    typed = results([tmp_path])
    found = typed.as_json()
    its = found["arms"]["er"]["continual"]
    assert its["forgetting"]["mean"] == pytest.approx(0.375)
    assert its["task_energy_j"]["mean"] == 2.0
    assert its["averages"][-1] == pytest.approx(0.658)
    assert "continual" not in found["arms"]["baseline"]
    page = report([tmp_path], out=tmp_path / "out").parent
    text = (page / "report.md").read_text()
    assert "## Tasks, one after another" in text
    assert "37.5 ± 0.0" in text
    assert (page / "figures" / "accuracy-by-tasks.svg").exists()
    assert "Tasks, one after another" in (page / "index.html").read_text()
    assert (page / "figures" / "energy-by-tasks.svg").exists()
    alone = typed.model_copy(update={"order": ["baseline"]})
    assert tasks.curve(alone) is None
    assert tasks.growth(alone) is None


def test_from_which_number_of_tasks_replay_saves() -> None:
    linear, quadratic = [3.0, 6.0, 9.0, 12.0], [1.0, 3.0, 6.0, 10.0]
    assert (
        tasks.cheaper("er", linear, "again", quadratic)
        == "er does not cost less than again within 4 tasks."
    )
    more = [*quadratic, 15.0, 21.0, 28.0]
    assert (
        tasks.cheaper("er", [3.0 * t for t in range(1, 8)], "again", more)
        == "er costs less than again from 6 tasks on."
    )
    assert (
        tasks.cheaper("er", [0.5], "again", [1.0])
        == "er costs less than again from the first task on."
    )
