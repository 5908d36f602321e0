"""The statistics and the words of a report, against reference formulas."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, dunnett, t, ttest_1samp, ttest_ind

from greenvis.report import formatting, measures, simultaneous, stats
from greenvis.report.estimates import Difference, Ratio, Summary

numbers = st.floats(min_value=-1e3, max_value=1e3).map(lambda x: round(x, 4))


@given(st.lists(numbers, min_size=2, max_size=9), st.lists(numbers, min_size=2, max_size=9))
def test_one_comparison_is_the_ordinary_interval(a: list[float], b: list[float]) -> None:
    groups = {"base": dict(enumerate(b)), "arm": dict(enumerate(a))}
    d = stats.differences(groups, "base")["arm"]
    if max(a) - min(a) + max(b) - min(b) < 1e-6:
        assert d.low == pytest.approx(d.high, abs=1e-5)
        return
    known = ttest_ind(a, b).confidence_interval(0.95)
    assert (d.low, d.high) == pytest.approx((known.low, known.high), rel=1e-6, abs=1e-6)
    assert (d.mean, d.n) == (pytest.approx(sum(a) / len(a) - sum(b) / len(b)), len(a))


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (2, 5, 3), (4, 2, 2, 6, 3)])
def test_several_are_dunnetts(sizes: tuple[int, ...]) -> None:
    rng = random.Random(len(sizes))
    groups = {str(i): {s: rng.gauss(i, 1) for s in range(n)} for i, n in enumerate(sizes)}
    base, *arms = (list(seeds.values()) for seeds in groups.values())
    known = dunnett(*arms, control=base).confidence_interval(0.95)  # its quantile is drawn
    ours = [*stats.differences(groups, "0").values()]
    for d, low, high in zip(ours, known.low, known.high, strict=True):
        assert d.low is not None
        assert d.high is not None
        assert (d.mean, d.high - d.low) == pytest.approx(((low + high) / 2, high - low), rel=0.02)


@pytest.mark.parametrize(
    ("df", "arms", "known"),
    [(5, 2, 3.03), (10, 3, 2.76), (20, 4, 2.65), (20, 9, 2.95), (math.inf, 4, 2.44)],
)
def test_quantiles_are_those_of_the_tables(df: float, arms: int, known: float) -> None:
    """C. W. Dunnett, New tables for multiple comparisons with a control, Biometrics, 1964."""
    assert simultaneous.quantile(df, [0.5] * arms) == pytest.approx(known, abs=0.006)
    assert simultaneous.quantile(df, [0.5] * arms) < t.ppf(1 - 0.05 / (2 * arms), df)


def test_one_seed_has_no_interval_and_equal_ones_a_point() -> None:
    assert stats.interval([1.0]) == (None, None)
    assert stats.interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    one = stats.differences({"base": {0: 1.0, 1: 2.0}, "arm": {1: 1.0}}, "base")["arm"]
    assert (one.mean, one.low, one.n) == (-0.5, None, 1)
    assert stats.differences({"base": {}, "arm": {1: 1.0}}, "base") == {}
    assert stats.summary({}) == Summary(mean=None, std=None, n=0)


def test_one_seed_takes_no_part_in_the_others_intervals() -> None:
    groups = {"base": {0: 1.0, 1: 1.2}, "arm": {0: 1.1, 1: 1.5}}
    alone = stats.differences(groups, "base")["arm"]
    assert stats.differences({**groups, "one": {0: 9.0}}, "base")["arm"] == alone


def test_a_ratio_is_its_inverse_turned_round() -> None:
    a, b = {0: 2.0, 1: 3.0, 2: 5.0}, {0: 4.0, 1: 3.5, 2: 11.0}
    forth, back = stats.ratio(a, b), stats.ratio(b, a)
    assert forth is not None
    assert back is not None
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert forth.low == pytest.approx(1 / (back.high or 0))
    assert stats.ratio({7: 2.0}, {8: 4.0}) == Ratio(ratio=0.5, low=None, high=None, n=1)
    assert stats.ratio({0: 1.0}, {0: 0.0}) is None
    assert stats.ratio({}, {0: 1.0}) is None
    assert stats.ratio({0: 0.0, 1: 0.0}, {0: 1.0}) == Ratio(ratio=0.0, low=None, high=None, n=2)


def test_a_ratios_interval_is_that_of_its_logarithm() -> None:
    groups = {
        "base": {0: 4.0, 1: 3.5, 2: 11.0},
        "a": {0: 2.0, 1: 3.0, 2: 5.0},
        "b": {0: 1.0, 1: 2.0},
    }
    logs = {g: {s: math.log(v) for s, v in seeds.items()} for g, seeds in groups.items()}
    ratios, differences = stats.ratios(groups, "base"), stats.differences(logs, "base")
    for g, r in ratios.items():
        d = differences[g]
        assert [math.log(x or 0) for x in (r.ratio, r.low, r.high)] == pytest.approx(
            [d.mean, d.low, d.high]
        )


def test_many_readings_decide_where_seeds_scatter_less_and_seeds_where_they_scatter_more() -> None:
    quiet = {"base": {0: 1.0, 1: 1.0, 2: 1.0}, "arm": {0: 0.9, 1: 0.9, 2: 0.9}}
    r = stats.ratios(quiet, "base", {"base": 0.03, "arm": 0.03})["arm"]
    half = 1.959964 * 0.03 * math.sqrt(2 / 3)  # normal: the passes are many
    assert (r.low, r.high) == pytest.approx((0.9 * math.exp(-half), 0.9 * math.exp(half)))
    loud = {"base": {0: 1.0, 1: 1.2, 2: 0.8}, "arm": {0: 0.9, 1: 0.7, 2: 1.1}}
    scatter = {"base": 0.001, "arm": 0.001}
    assert stats.ratios(loud, "base", scatter) == stats.ratios(loud, "base")


def test_a_small_test_limits_what_is_said() -> None:
    assert stats.proportion(1.0, 12) == (pytest.approx(0.735, abs=0.001), 1.0)
    low, high = stats.proportion(0.9, 450)
    known = binomtest(405, 450).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((known.low, known.high))
    groups = {"base": {0: 1.0, 1: 1.0}, "arm": {0: 1.0, 1: 1.0}}
    d = stats.differences(groups, "base", margin=0.005, least=1 / 12)["arm"]
    assert (d.low, d.high, d.verdict, d.more_seeds) == (-1 / 12, 1 / 12, "not yet decided", None)
    assert stats.differences(groups, "base", margin=0.005, least=1 / 450)["arm"].verdict == "keeps"


def test_seeds_that_go_together_are_seen() -> None:
    assert stats.correlation([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]) == pytest.approx(1.0)
    assert stats.correlation([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]) is None
    assert stats.correlation([(1.0, 2.0), (2.0, 1.0)]) is None


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(0.0, 0.004, "keeps"), (-0.001, 0.003, "keeps"), (0.02, 0.02, "keeps"), (-0.02, 0.01, "loses"),
     (-0.01, 0.006, "not yet decided"), (0.02, 0.03, "not yet decided"), (-0.003, 0.0, "keeps"),
     (-0.006, 0.0, "loses")],
)  # fmt: skip
def test_the_whole_interval_decides_against_the_margin(
    mean: float, half: float, verdict: str
) -> None:
    d = Difference(mean=mean, low=mean - half, high=mean + half, n=3)
    assert stats.decide(d, 0.005) == verdict
    turned = Difference(mean=-mean, low=-mean - half, high=-mean + half, n=3)
    assert stats.decide(turned, 0.005, lower_is_better=True) == verdict


def test_an_interval_that_ends_on_the_margin_keeps() -> None:
    for low, high, verdict in (
        (-0.5, 0.25, "keeps"),
        (-0.5, -0.5, "keeps"),
        (-0.75, -0.5, "not yet decided"),
    ):
        d = Difference(mean=(low + high) / 2, low=low, high=high, n=3)
        assert stats.decide(d, 0.5) == verdict


def test_as_many_more_seeds_as_said_decide_it_and_one_fewer_do_not() -> None:
    base, arm = (0.0, 0.004, -0.004), (0.010, -0.002, 0.001)  # mean 0.3 points, scatter 0.5
    other = (0.5, 0.51, 0.49)
    groups = {n: dict(enumerate(v)) for n, v in (("base", base), ("arm", arm), ("other", other))}
    d = stats.differences(groups, "base", 0.005)["arm"]
    assert d.verdict == "not yet decided"
    assert d.more_seeds
    pooled, room = stats.Pooled.of(groups, "base"), d.mean + 0.005
    halves = [pooled.half("arm", more) for more in (d.more_seeds - 1, d.more_seeds)]
    assert [half < room for half in halves] == [False, True]
    assert pooled.more_seeds("arm", 0.0) is None  # no number would
    alone = Difference(mean=0.1, low=None, high=None, n=1)
    assert stats.decide(alone, 0.005) == "not yet decided"


def test_pareto_front_is_what_nothing_beats() -> None:
    points = {
        "cheap": (1.0, 0.5),
        "good": (2.0, 0.9),
        "beaten": (3.0, 0.8),
        "dear": (4.0, 0.95),
        "twin": (2.0, 0.7),
    }
    assert stats.pareto(points) == ["cheap", "good", "dear"]


@pytest.mark.parametrize(
    ("extra", "saved", "verdict", "images"),
    [(100.0, 2.0, "pays back", 50.0), (100.0, 0.0, "never", None), (100.0, -1.0, "never", None),
    (-5.0, 0.0, "at once", 0.0),
     (-100.0, -2.0, "ahead until", 50.0), (0.0, 1.0, "at once", 0.0)],
)  # fmt: skip
def test_payback(extra: float, saved: float, verdict: str, images: float | None) -> None:
    p = stats.payback(extra, saved)
    assert (p.verdict, p.images) == (verdict, images)


def test_energy_to_a_target_must_stay_reached() -> None:
    curve = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.7), (4.0, 0.85), (5.0, 0.9)]
    assert stats.energy_to(curve, 0.8) == 4.0
    assert stats.energy_to(curve, 0.95) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(3530.8, "J", "3.5 kJ"), (0.46588, "g", "470 mg"), (999.9, "J", "1.0 kJ"), (0.0, "J", "0 J"),
    (None, "J", "–"),
     (5717416, "", "5.72 M"), (12.0, "", "12.0"), (math.inf, "J", "–"), (-1500.0, "J", "-1.5 kJ")],
)  # fmt: skip
def test_units(value: float | None, unit: str, text: str) -> None:
    assert formatting.si(value, unit) == text


def test_ratios_in_words() -> None:
    assert (
        formatting.times(Ratio(ratio=0.476, low=0.43, high=0.526, n=3), "energy")
        == "2.1 times less energy (1.9–2.3)"
    )
    assert (
        formatting.times(Ratio(ratio=3.0, low=None, high=None, n=3)) == "–"
    )  # one seed gives no ratio
    assert (
        formatting.times(Ratio(ratio=1.12, low=1.09, high=1.14, n=3), "energy")
        == "12 % more energy (9.0–14)"
    )
    assert formatting.times(Ratio(ratio=0.8, low=0.7, high=0.9, n=3)) == "20 % less (10–30)"
    assert (
        formatting.times(Ratio(ratio=0.95, low=0.9, high=1.02, n=3), "energy")
        == "no difference shown in energy (×0.950, 0.900–1.02)"
    )
    assert (
        formatting.times(Ratio(ratio=0.2, low=1e-9, high=0.9, n=3))
        == "5.0 times less (1.1–over 100)"
    )
    assert formatting.times(Ratio(ratio=1.0, low=1.0, high=1.0, n=3)) == "the same"
    assert formatting.times(None) == "–"


@pytest.mark.parametrize("low", [-0.02, -0.001, 0.001])
@pytest.mark.parametrize("high", [-0.0005, 0.0, 0.03])
def test_what_is_shown_is_what_the_interval_leaves_out(low: float, high: float) -> None:
    d = Difference(mean=0.0, low=low, high=high, n=3)
    assert formatting.shown(d) == (not low <= 0 <= high)
    r = Ratio(ratio=1.0, low=1 + low, high=1 + high, n=3)
    assert formatting.shown(r) == (not low <= 0 <= high)
    assert not formatting.shown(d.model_copy(update={"low": None}))


def test_what_is_decided_in_words() -> None:
    d = Difference(mean=0.0, low=-0.01, high=0.01, n=3, verdict="not yet decided", more_seeds=9)
    assert (
        formatting.decided(d, "0.5 points")
        == "not yet decided at 0.5 points, about 9 more seeds would tell"
    )
    assert "more seeds than could be run" in formatting.decided(
        d.model_copy(update={"more_seeds": None})
    )
    assert (
        formatting.decided(d.model_copy(update={"verdict": "keeps"}), "1 point")
        == "kept within 1 point"
    )
    assert (
        formatting.decided(d.model_copy(update={"verdict": "loses"}), "1 point")
        == "loses more than 1 point"
    )
    assert formatting.decided(d.model_copy(update={"n": 1})) == "one seed: not decided"
    assert "no value" in formatting.decided(None)


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.04, "0.0"), (0.0, "0.0"), (-0.06, "−0.1"), (1.25, "1.2"), (-12.0, "−12.0")],
)
def test_nothing_has_no_sign(value: float, text: str) -> None:
    assert formatting.fixed(value) == text
    assert formatting.gain(measures.named("accuracy"), value / 100) == f"{text}\u00a0%"
    assert formatting.fixed(value, sign=True) == (text if text[0] in "0−" else f"+{text}")
    assert formatting.points(measures.named("accuracy"), -0.00004) == "0.00 points"


def test_counts_and_times_in_words() -> None:
    assert formatting.count(41234) == "41,200"
    assert formatting.count(4.78e6) == "4.78 million"
    assert formatting.duration(469) == "7 min 49 s"
    assert formatting.duration(7500) == "2 h 05 min"
    assert formatting.lamp(3000) == "a 10 W lamp for 5 min 00 s"


def test_at_both_ends_of_a_quotient_students_t_just_rejects() -> None:
    """Fieller: R is in the interval where the mean of top - R·below is not shown to differ from
    0."""
    pairs = [(40.0, 10.0), (44.0, 12.0), (37.0, 9.0), (45.0, 14.0)]
    low, high = stats.quotient(pairs)
    assert low is not None
    assert high is not None
    for end in (low, high):
        rest = [a - end * b for a, b in pairs]
        assert ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)
    assert low < 166 / 45 < high


def test_a_quotient_whose_lower_part_may_be_nothing_has_no_upper_end() -> None:
    pairs = [(40.0, 10.0), (44.0, -2.0), (42.0, 9.0)]
    low, high = stats.quotient(pairs)
    assert high is None
    assert low is not None
    rest = [a - low * b for a, b in pairs]
    assert ttest_1samp(rest, 0).pvalue == pytest.approx(0.05)
    assert stats.quotient([(-40.0, 10.0), (40.0, -2.0), (1.0, 9.0)]) == (None, None)
    assert stats.quotient(pairs[:1]) == (None, None)
    beyond = [(58.0, 648.0), (21.0, 450.0), (21.0, 278.0)]  # all but 0.14 to 10.6 may be true
    assert stats.quotient(beyond) == (None, None)
