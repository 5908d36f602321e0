"""Numbers and findings in words: three figures, units people read, and no more claimed than the data shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from greenvis.report.stats import ALPHA

MISSING = "–"
_PREFIX = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
_SHARES = ("accuracy", "top1", "top5", "f1", "miou", "map", "auc", "recall", "precision")


def figures(value: float, digits: int = 3) -> str:
    """Return `value` with that many significant figures, never in exponents below 1e6: 0.0123, 1.23, 12,300."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    return f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Return `value` with an SI prefix: "3.53 kJ", "0.46 g" as "465 mg", "1.26 G"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return f"0 {unit}".strip()
    rounded = float(f"{value:.{digits - 1}e}")
    scale, prefix = next(((s, p) for s, p in _PREFIX if abs(rounded) >= s), _PREFIX[-1])
    if not unit and scale <= 1:
        return figures(value, digits)
    return f"{figures(value / scale, digits)} {prefix}{unit}".strip()


def count(value: float | None) -> str:
    """Return a whole number with separators, or three figures and a word above a million: "41,000", "1.2 million"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for scale, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= scale:
            return f"{figures(value / scale)} {word}"
    return figures(float(round(value)), 3) if abs(value) >= 100 else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Return "12.3 s", "4 min 10 s" or "2 h 05 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{figures(seconds)} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """Return bytes as "590 kB"."""
    return si(value, "B")


def share(metric: str) -> bool:
    """Return whether the metric is a share of 1, written in per cent."""
    return any(metric.lower().endswith(s) for s in _SHARES)


def gain(metric: str, value: float | None) -> str:
    """Return a metric's value: "88.9 %" for shares, three figures else."""
    if value is None:
        return MISSING
    return f"{value * 100:.1f}\u00a0%" if share(metric) else figures(value)


def points(metric: str, value: float | None) -> str:
    """Return a signed difference of the metric: "+1.5 points" for shares."""
    if value is None:
        return MISSING
    text = f"{value * 100:+.2f}" if share(metric) else f"{'+' if value >= 0 else '-'}{figures(abs(value))}"
    text = text[1:] if not float(text.replace(",", "")) else text  # no sign for nothing
    return text.replace("-", "−") + (" points" if share(metric) else "")


def spread(metric: str, s: Mapping[str, Any]) -> str:
    """Return "88.9 % ± 0.3" (standard deviation over seeds), or the value alone for one seed."""
    if s["mean"] is None:
        return MISSING
    if s["std"] is None:
        return gain(metric, s["mean"])
    return (
        f"{gain(metric, s['mean'])} ± {s['std'] * 100:.1f}"
        if share(metric)
        else f"{figures(s['mean'])} ± {figures(s['std'], 2)}"
    )


def times(r: Mapping[str, Any] | None, what: str = "") -> str:
    """Return a ratio to the baseline in words: "2.1 times less energy (1.9–2.3)"; the range is over seeds."""
    if not r or r["ratio"] is None or r["ratio"] <= 0:
        return MISSING
    ratio, low, high = r["ratio"], r["low"], r["high"]
    what = f" {what}" if what else ""
    if abs(ratio - 1) < 0.005:
        return f"the same{what}" + (
            f" ({figures(low)}–{figures(high)} times)" if low is not None and high is not None and high - low > 0.005 else ""
        )
    less = ratio < 1
    k = 1 / ratio if less else ratio
    if k < 1.5:
        return _percent(r, what)
    ends = "" if low is None or high is None else [1 / high, 1 / low] if less and low > 0 else [low, high]
    band = f" ({_ratio(ends[0])}–{_ratio(ends[1])})" if ends else ""
    return f"{_ratio(k)} times {'less' if less else 'more'}{what}{band}"


def _percent(r: Mapping[str, Any], what: str) -> str:
    """Return a small ratio as "12 % more energy (9–14)"; a band that crosses 1 keeps its signs."""
    change = (r["ratio"] - 1) * 100
    text = f"{figures(abs(change), 2)} % {'less' if change < 0 else 'more'}{what}"
    if r["low"] is None or r["high"] is None:
        return text
    ends = [(r["low"] - 1) * 100, (r["high"] - 1) * 100]
    if ends[0] < 0 < ends[1]:
        return f"{text} ({figures(-ends[0], 2)} % less to {figures(ends[1], 2)} % more)"
    near, far = sorted(map(abs, ends))
    return f"{text} ({figures(near, 2)}–{figures(far, 2)})"


def _ratio(k: float) -> str:
    return figures(k, 2 if k >= 1.095 and k < 100 else 3)


def significance(d: Mapping[str, Any] | None) -> str:
    """Return what a paired test says: "difference shown", "no difference shown", or why nothing can be said."""
    if not d or not d.get("n"):
        return "no seed in common: not comparable by pairs"
    if d["n"] == 1:
        return "one seed: no spread is known"
    p = d.get("p_adjusted", d.get("p_value"))
    if p is None:
        return f"the same difference at all {d['n']} seeds: no test possible"
    return f"{'difference shown' if p < ALPHA else 'no difference shown'} ({p_text(p)}, {d['n']} seeds)"


def p_text(p: float) -> str:
    """Return "p = 0.031", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {figures(p, 2)}"


def shown(d: Mapping[str, Any] | None) -> bool:
    """Return whether a difference is shown: by a paired test, or by being the same at each of several seeds."""
    if not d or d["n"] < 2:
        return False
    p = d.get("p_adjusted", d.get("p_value"))
    return p is None or p < ALPHA


def factor(r: Mapping[str, Any] | None) -> str:
    """Return a ratio to the baseline for a table, where all rows must read alike: "×0.48"."""
    return MISSING if not r or r["ratio"] is None else f"×{figures(r['ratio'], 2 if 0.995 <= r['ratio'] < 1.005 else 3)}"


def factor_band(r: Mapping[str, Any] | None) -> str:
    """Return the lowest and highest seed of a ratio: "×0.47–0.49"."""
    return "" if not r or r["low"] is None or r["high"] is None else f"×{figures(r['low'])}–{figures(r['high'])}"


def payback(p: Mapping[str, Any] | None, arm: str, base: str) -> str:
    """Return a payback in words."""
    if not p:
        return f"{arm}: unknown, inference energy was not measured."
    n, band = count(p["images"]), ""
    if p["low"] is not None and p["high"] is not None and p["verdict"] in ("pays back", "ahead until"):
        band = f" ({count(p['low'])}–{count(p['high'])} over seeds)"
    unsure = {True: "", False: " The seeds do not agree.", None: " One seed: an indication, no more."}[p["seeds_agree"]]
    text = {
        "at once": f"{arm} is ahead of {base} from the first image",
        "pays back": f"{arm} pays back after {n} images{band}",
        "ahead until": f"{arm} is ahead of {base} until {n} images{band}, then behind",
        "never": f"{arm} never pays back: dearer to make and not cheaper to use than {base}",
        "not shown": f"{arm}: no difference shown in the energy of one image to {base}, so no payback is stated",
    }[p["verdict"]]
    return text + "." + (unsure if p["verdict"] != "not shown" else "")


def lamp(joules: float) -> str:
    """Return the energy as how long a 10 W lamp burns on it: an equivalent that needs no source but 10 W × time."""
    return f"a 10 W lamp for {duration(joules / 10)}"
