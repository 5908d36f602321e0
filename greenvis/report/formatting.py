"""Numbers and findings in words: three figures, units people read, and no more claimed than the
data shows."""

from __future__ import annotations

import math

from greenvis.meters.units import MISSING as MISSING
from greenvis.meters.units import duration as duration
from greenvis.meters.units import figures as figures
from greenvis.meters.units import si as si
from greenvis.report.estimates import Difference, Estimate, Payback, Ratio, Summary
from greenvis.report.measures import is_share, suffix
from greenvis.tasks.base import Measure

TIMES = 1.5  # from here on "times", below per cent


def reading(r: Estimate, unit: str) -> str:
    """Return a reading's value with the figures its band and its scatter deserve: two, or three
    where both are below 0.5 %."""
    value = r.value
    if not value:
        return si(value, unit)
    ends = [abs(end - value) for end in (r.low, r.high) if end is not None] + [r.std or 0.0]
    return si(value, unit, 3 if max(ends) < 0.005 * abs(value) else 2)


def count(value: float | None) -> str:
    """Return a whole number with separators, or three figures and a word above a million: "41,000",
    "1.2 million"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for scale, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= scale:
            return f"{figures(value / scale)} {word}"
    return figures(float(round(value)), 3) if abs(value) >= 100 else f"{value:.0f}"


def size(value: float | None) -> str:
    """Return bytes as "590 kB"."""
    return si(value, "B")


def gain(measure: Measure, value: float | None) -> str:
    """Return a metric's value: "88.9 %" for shares, three figures and the unit else."""
    if value is None:
        return MISSING
    if is_share(measure):
        return f"{fixed(value * 100)}\u00a0%"
    return figures(value).replace("-", "−") + suffix(measure)


def plural(unit: str) -> str:
    """Return several of what is served: "images"."""
    return unit if unit.endswith("s") else f"{unit}s"


def fixed(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """Return `value` with that many decimals: "−1.4", with `sign` also "+1.4"; what rounds to
    nothing has no sign."""
    text = f"{value:+.{digits}f}"
    if not float(text):
        return text[1:]
    return text.replace("-", "−") if sign or value < 0 else text[1:]


def points(measure: Measure, value: float | None, digits: int = 2) -> str:
    """Return a signed difference of the metric: "+1.50 points" for shares, "−0.21 px" else."""
    if value is None:
        return MISSING
    unit = " points" if is_share(measure) else suffix(measure)
    return _signed(measure, value, digits) + unit


def _signed(measure: Measure, value: float, digits: int = 2) -> str:
    if is_share(measure):
        return fixed(value * 100, digits, sign=True)
    return ("+" if value > 0 else "−" if value < 0 else "") + figures(abs(value))


def interval(measure: Measure, d: Difference, digits: int = 2) -> str:
    """Return the interval of a difference of the metric: "−1.48 to +2.07"; "" where there is
    none."""
    if d.low is None or d.high is None:
        return ""
    return " to ".join(_signed(measure, end, digits) for end in (d.low, d.high))


def spread(measure: Measure, s: Summary) -> str:
    """Return "88.9 % ± 0.3" (standard deviation over seeds), or the value alone for one seed."""
    if s.mean is None:
        return MISSING
    if s.std is None:
        return gain(measure, s.mean)
    if is_share(measure):
        return f"{gain(measure, s.mean)} ± {s.std * 100:.1f}"
    return f"{figures(s.mean)} ± {figures(s.std, 2)}{suffix(measure)}".replace("-", "−")


def times(r: Ratio | None, what: str = "", *, band: bool = True) -> str:
    """Return a ratio to the baseline in words, with its interval, as far as that interval goes.

    "2.1 times less energy (1.9–2.3)", "12 % more energy (9.0–14)"; "no difference shown in energy
    (×0.95, 0.88–1.02)" where the interval reaches 1; MISSING without an interval: one seed tells no
    difference from scatter. band: whether to name the interval.
    """
    if r is None or r.low is None or r.high is None:
        return MISSING
    if r.low == r.high == 1:
        return f"the same {what}".strip()
    if not shown(r):
        text = f"no difference shown{f' in {what}' if what else ''}"
        return f"{text} ({factor(r)}, {factor_band(r).removeprefix('×')})" if band else text
    what = f"{'less' if r.ratio < 1 else 'more'} {what}".strip()
    size, ends = change(r)
    return f"{size} {what}" + (f" ({ends})" if band and ends else "")


def change(r: Ratio) -> tuple[str, str]:
    """Return how many times, or by how many per cent, a ratio is less or more than 1, and the ends
    of its interval likewise: ("2.1 times", "1.9–2.3"), ("12 %", "9.0–14")."""
    ratio, low, high = r.ratio, r.low or r.ratio, r.high or r.ratio
    less = ratio < 1
    k, near, far = (1 / ratio, 1 / high, 1 / low) if less else (ratio, low, high)
    if k >= TIMES:
        ends = [_end(x, 2 if x >= 1.095 and x < 100 else 3) for x in (near, far)]
        size = f"{figures(k, 2 if k < 100 else 3)} times"
    else:
        percents = (ratio, high, low) if less else (ratio, low, high)
        first, *ends = [figures(abs(x - 1) * 100, 2) for x in percents]
        size = f"{first} %"
    return size, "" if ends[0] == ends[1] else "–".join(ends)


def _end(k: float, digits: int = 3) -> str:
    """Return an end of an interval of a ratio; one too far off to matter is not written out."""
    return "over 100" if k > 100 else "under 0.01" if k < 0.01 else figures(k, digits)


def decided(d: Difference | None, margin: str = "") -> str:
    """Return what the interval of the metric says: "keeps", "loses", or "not yet decided", and how
    many seeds would tell.

    margin: how much may be lost, in words, if that is to be said.
    """
    if d is None or not d.n:
        return "no value to compare"
    if d.n == 1:
        return "one seed: not decided"
    if d.verdict == "keeps":
        return f"kept within {margin}" if margin else "keeps"
    if d.verdict == "loses":
        return f"loses more than {margin}" if margin else "loses"
    more = d.more_seeds
    seeds = "one more seed" if more == 1 else f"{more} more seeds"
    hint = f"about {seeds} would tell" if more else "more seeds than could be run would tell"
    return f"not yet decided{f' at {margin}' if margin else ''}, {hint}"


def shown(d: Ratio | Difference | None) -> bool:
    """Return whether the interval of a difference lies on one side of 0, or that of a ratio on one
    side of 1."""
    if d is None or d.low is None or d.high is None:
        return False
    return d.low > d.same or d.high < d.same


def factor(r: Ratio | None) -> str:
    """Return a ratio to the baseline for a table, where all rows must read alike: "×0.48"; MISSING
    for one seed."""
    if r is None or r.low is None:
        return MISSING
    return f"×{figures(r.ratio, 2 if 0.995 <= r.ratio < 1.005 else 3)}"


def factor_band(r: Ratio | None) -> str:
    """Return the interval of a ratio: "×0.47–0.49"."""
    if r is None or r.low is None or r.high is None:
        return ""
    return f"×{_end(r.low)}–{_end(r.high)}"


def payback(p: Payback | None, arm: str, base: str, unit: str = "image") -> str:
    """Return a payback in words; unit: of what is served."""
    if not p:
        return f"{arm}: unknown, inference energy was not measured."
    n, band = f"{count(p.images)} {plural(unit)}", ""
    if p.low is not None and p.high is not None and p.verdict in ("pays back", "ahead until"):
        band = f" ({count(p.low)}–{count(p.high)} over seeds)"
    unsure = "" if p.seeds_agree else " The seeds do not agree."
    text = {
        "at once": f"{arm} is ahead of {base} from the first {unit}",
        "pays back": f"{arm} pays back after {n}{band}",
        "ahead until": f"{arm} is ahead of {base} until {n}{band}, then behind",
        "never": f"{arm} never pays back: dearer to make and not cheaper to use than {base}",
        "not shown": f"{arm}: no difference shown in the energy of one {unit} to {base}, so no "
        "payback is stated",
    }[p.verdict]
    return text + "." + (unsure if p.verdict != "not shown" else "")


def lamp(joules: float) -> str:
    """Return the energy as how long a 10 W lamp burns on it: an equivalent that needs no source but
    10 W × time."""
    return f"a 10 W lamp for {duration(joules / 10)}"
