"""Which pretext at which budget: read off the committed report, with its intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.report import stats
from greenvis.report.formatting import fixed, si

RESULTS = Path(__file__).parents[2] / "reports/pretexts-fashion/results.json"
Arms = Mapping[str, Mapping[str, Any]]


def table(results: Mapping[str, Any]) -> str:
    """Return what each pretext and the supervised model cost and reached, and which to take at
    which budget, as Markdown.

    Args:
        results: A report's, whose arms NAME-N tune the pretext NAME on N labels; its baseline
            learns from as many labels alone.
    """
    arms, base = results["arms"], results["baseline"]
    tuned = {a: a.rpartition("-")[0] for a in results["order"] if a.rpartition("-")[0] in arms}
    labels, many = _labels(arms[base]), max(part["train"] for part in results["data"])
    spread = stats.means({a: row["accuracy"]["by_seed"] for a, row in arms.items()})
    lines = [
        f"| | joules, pretext included | beside {base} | accuracy with {labels} labels | points "
        f"beside {base} | nearest neighbours among {many:,} labels |",
        "|---|--:|--:|--:|--:|--:|",
        f"| {base} | {si(_joules(arms[base]), 'J')} | | {_share(spread[base])} | | |",
    ]
    for arm, pretext in tuned.items():
        ratio = arms[arm]["vs_baseline"]["train_energy_with_reuse"]
        lines.append(
            f"| {pretext} | {si(_joules(arms[arm]), 'J')} | ×{ratio['ratio']:.3g} "
            f"({ratio['low']:.3g}–{ratio['high']:.3g}) | {_share(spread[arm])} | "
            f"{_points(arms[arm])} | {_share(spread[pretext])} |"
        )
    few = _steps(arms, [base, *tuned], spread)
    neighbours = _steps(arms, list(tuned.values()), spread)
    lines += ["", "| labels | joules | take | accuracy |", "|---|---|---|---|"]
    lines += [f"| {labels} | {at} | {arm} | {share} |" for at, arm, share in few]
    lines += [f"| {many:,} | {at} | {arm} | {share} |" for at, arm, share in neighbours]
    return "\n".join([*lines, "", _said(arms, base, tuned, labels), ""])


def _said(arms: Arms, base: str, tuned: Mapping[str, str], labels: int) -> str:
    """Return in sentences which pretexts are shown to be better or worse than labels alone."""
    beside = {a: arms[a]["vs_baseline"]["accuracy"] for a in tuned}
    better = [tuned[a] for a, d in beside.items() if d["low"] > 0]
    worse = [tuned[a] for a, d in beside.items() if d["high"] < 0]
    open_ = [tuned[a] for a, d in beside.items() if d["low"] <= 0 <= d["high"]]
    first = (
        f"With {labels} labels {', '.join(better)} are shown to do better than {base}"
        if better
        else f"With {labels} labels no pretext is shown to do better than {base}: train on the "
        "labels alone, unless the base is used again or joules are short"
    )
    more = [f"{', '.join(worse)} are shown to do worse"] if worse else []
    more += [f"{', '.join(open_)} are not told apart from it by these seeds"] if open_ else []
    return (
        f"{'; '.join([first, *more])}. A row of the second table is the best mean that so many "
        "joules buy; where intervals overlap, the cheaper one may be as good."
    )


def _steps(
    arms: Arms, names: list[str], spread: Mapping[str, tuple[float, float, float]]
) -> list[tuple[str, str, str]]:
    """Return (joules from which on, arm, accuracy) of the arms that none is cheaper and better
    than."""
    front = stats.pareto({a: (_joules(arms[a]), spread[a][0]) for a in names})
    ordered = sorted(front, key=lambda arm: _joules(arms[arm]))
    return [(f"from {si(_joules(arms[a]), 'J')}", a, _share(spread[a])) for a in ordered]


def _joules(row: Mapping[str, Any]) -> float:
    return row["train_energy_with_reuse_j"]["value"]


def _labels(row: Mapping[str, Any]) -> int:
    return round(sum(each["count"] for each in row["labels"]))


def _share(mean: tuple[float, float, float]) -> str:
    value, low, high = (fixed(100 * v) for v in mean)
    return f"{value} % ({low}–{high})"


def _points(row: Mapping[str, Any]) -> str:
    d = row["vs_baseline"]["accuracy"]
    value, low, high = (fixed(100 * d[k], sign=True) for k in ("mean", "low", "high"))
    return f"{value} ({low} to {high})"


def committed() -> str:
    """Return the table of the committed report."""
    return table(json.loads(RESULTS.read_text()))
