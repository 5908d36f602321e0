"""The statistics and the words of a report, against reference formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from greenvis.report import stats, words

numbers = st.floats(min_value=-1e3, max_value=1e3).map(lambda x: round(x, 4))


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9))
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    d = stats.difference(dict(enumerate(a)), dict(enumerate(b)))
    assert d is not None
    diffs = [x - y for x, y in pairs]
    if max(diffs) - min(diffs) < 1e-6:
        assert d["p_value"] in (1.0, None)
        return
    assert d["p_value"] == pytest.approx(ttest_rel(a, b).pvalue, rel=1e-6, abs=1e-12)
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    assert (d["low"], d["high"]) == (pytest.approx(low, rel=1e-6, abs=1e-6), pytest.approx(high, rel=1e-6, abs=1e-6))


def test_one_pair_or_the_same_difference_allow_no_test() -> None:
    assert stats.t_test([1.0]) is None
    assert stats.t_test([2.0, 2.0, 2.0]) is None
    assert stats.t_test([0.0, 0.0]) == 1.0
    assert stats.difference({0: 1.0}, {1: 1.0}) is None
    assert stats.summary({}) == {"mean": None, "std": None, "n": 0}


def test_a_ratio_is_its_inverse_turned_round() -> None:
    a, b = {0: 2.0, 1: 3.0, 2: 5.0}, {0: 4.0, 1: 3.5, 2: 11.0}
    forth, back = stats.ratio(a, b), stats.ratio(b, a)
    assert forth is not None
    assert back is not None
    assert forth["ratio"] == pytest.approx(1 / back["ratio"])
    assert forth["low"] == pytest.approx(1 / back["high"])
    unpaired = stats.ratio({7: 2.0}, {8: 4.0})
    assert unpaired == {"ratio": 0.5, "low": None, "high": None, "n": 0, "p_value": None}
    assert stats.ratio({0: 1.0}, {0: 0.0}) is None
    assert stats.ratio({}, {0: 1.0}) is None


def test_holm_grows_with_the_number_of_comparisons() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": None}) == {"a": 0.02, "b": 0.04, "c": None}
    assert stats.holm({"a": 0.03, "b": 0.031}) == {"a": 0.06, "b": 0.06}


def test_pareto_front_is_what_nothing_beats() -> None:
    points = {"cheap": (1.0, 0.5), "good": (2.0, 0.9), "beaten": (3.0, 0.8), "dear": (4.0, 0.95), "twin": (2.0, 0.7)}
    assert stats.pareto(points) == ["cheap", "good", "dear"]


@pytest.mark.parametrize(
    ("extra", "saved", "verdict", "images"),
    [(100.0, 2.0, "pays back", 50.0), (100.0, 0.0, "never", None), (100.0, -1.0, "never", None), (-5.0, 0.0, "at once", 0.0),
     (-100.0, -2.0, "ahead until", 50.0), (0.0, 1.0, "at once", 0.0)],
)  # fmt: skip
def test_payback(extra: float, saved: float, verdict: str, images: float | None) -> None:
    assert stats.payback(extra, saved) == {"verdict": verdict, "images": images}


def test_energy_to_a_target_must_stay_reached() -> None:
    curve = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.7), (4.0, 0.85), (5.0, 0.9)]
    assert stats.energy_to(curve, 0.8) == 4.0
    assert stats.energy_to(curve, 0.95) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(3530.8, "J", "3.53 kJ"), (0.46588, "g", "466 mg"), (999.9, "J", "1.00 kJ"), (0.0, "J", "0 J"), (None, "J", "–"),
     (5717416, "", "5.72 M"), (12.0, "", "12.0"), (math.inf, "J", "–"), (-1500.0, "J", "-1.50 kJ")],
)  # fmt: skip
def test_units(value: float | None, unit: str, text: str) -> None:
    assert words.si(value, unit) == text


def test_ratios_in_words() -> None:
    assert words.times({"ratio": 0.476, "low": 0.43, "high": 0.526}, "energy") == "2.1 times less energy (1.9–2.3)"
    assert words.times({"ratio": 3.0, "low": None, "high": None}) == "3.0 times more"
    assert words.times({"ratio": 1.12, "low": 1.09, "high": 1.14}, "energy") == "12 % more energy (9.0–14)"
    assert words.times({"ratio": 0.95, "low": 0.9, "high": 1.02}) == "5.0 % less (10 % less to 2.0 % more)"
    assert words.times({"ratio": 1.0, "low": None, "high": None}) == "the same"
    assert words.times(None) == "–"


def test_no_more_is_claimed_than_shown() -> None:
    d = stats.difference({0: 0.90, 1: 0.91, 2: 0.89}, {0: 0.89, 1: 0.91, 2: 0.90})
    assert d is not None
    assert words.significance(d).startswith("no difference shown (p = ")
    assert words.significance(stats.difference({0: 0.9}, {0: 0.8})) == "one seed: no spread is known"
    assert "no seed in common" in words.significance(None)
    assert not words.shown({"n": 3, "p_value": 0.01, "p_adjusted": 0.06})
    assert words.significance({"n": 3, "p_value": 1e-9}) == "difference shown (p < 0.001, 3 seeds)"


def test_counts_and_times_in_words() -> None:
    assert words.count(41234) == "41,200"
    assert words.count(4.78e6) == "4.78 million"
    assert words.duration(469) == "7 min 49 s"
    assert words.duration(7500) == "2 h 05 min"
    assert words.lamp(3000) == "a 10 W lamp for 5 min 00 s"
