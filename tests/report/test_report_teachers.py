"""A report says how much several teachers contradicted each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.report.arm_results import Teachers
from greenvis.report.facts import Facts
from greenvis.report.teachers import teachers

CONFLICT = {"disagreement": [0.5, 0.25], "kl": [1.0, 0.5], "cosine": [-0.25, 0.125]}


def _teachers(*facts: dict[str, object]) -> Teachers | None:
    return teachers([Facts.of(one) for one in facts])


def test_conflict_and_weights_are_means_over_runs() -> None:
    other = {"disagreement": [0.3, 0.2, 0.15], "kl": [3.0, 2.0, 1.5], "cosine": [0.25, 0.0, 0.375]}
    found = _teachers(
        {"x_conflict": CONFLICT, "x_teachers": {"a": 0.75, "b": 0.25}}, {"x_conflict": other}
    )
    assert found is not None
    assert found.weights == {"a": 0.75, "b": 0.25}
    assert found.conflict["disagreement"] == pytest.approx((0.4, 0.2))
    assert found.conflict["kl"] == pytest.approx((2.0, 1.0))
    assert found.conflict["cosine"] == pytest.approx((0.0, 0.25))


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"x": {"disagreement": [], "kl": [1.0], "cosine": [1.0]}},
        {"x": {"kl": "much"}},
        {"x_teachers": {"a": "most"}},
    ],
)
def test_what_is_no_conflict_is_left_out(facts: dict[str, object]) -> None:
    assert _teachers(facts) is None


def test_the_report_shows_it_and_only_where_there_is_one(tmp_path: Path) -> None:
    for name, facts in (
        ("two", {"x_conflict": CONFLICT, "x_teachers": {"a": 0.75, "b": 0.25}}),
        ("one", {}),
    ):
        with gv.track(name, dir=tmp_path) as run:
            run.fact(accuracy=0.5, **facts)
    gv.report([tmp_path], out=tmp_path / "out")
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "| two | 0.50 → 0.25 | 1.00 → 0.50 | −0.25 → 0.12 | a 0.75, b 0.25 |" in shown
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["two"]["teachers"][
        "conflict"
    ]["kl"] == [1.0, 0.5]
    gv.report([tmp_path / "one"], out=tmp_path / "alone")
    assert "Several teachers" not in (tmp_path / "alone" / "report.md").read_text()
