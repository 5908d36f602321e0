"""How arms look, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from greenvis.report import figures, measures, verdict
from greenvis.report.shape import Results

Looks = dict[str, dict[str, Any]]


def looks(results: Results) -> Looks:
    """Return each arm's colour, marker and line; the grey is the baseline's alone."""
    offset = 0 if results.baseline in results.order else 1
    return {a: figures.style(i + offset) for i, a in enumerate(results.order)}


def most(labels: Sequence[str]) -> tuple[list[str], str]:
    """Return the arms a figure can hold, and what to say of the rest."""
    rest = len(labels) - figures.MOST_ARMS
    more = f" The first {figures.MOST_ARMS} of {len(labels)} arms." if rest > 0 else ""
    return list(labels[: figures.MOST_ARMS]), more


def series(results: Results, arm: str) -> int:
    """Return the number of an arm's colour among those of the page, the same in all figures."""
    return figures.COLOURS.index(looks(results)[arm]["color"])


def few(results: Results, labels: Sequence[str]) -> tuple[list[str], str]:
    """Return the arms whose lines a figure can hold side by side, and what to say of the rest: the
    baseline, the arm of the verdict, then the best."""
    sign = -1.0 if results.lower_is_better else 1.0
    first = (results.baseline, verdict.headline(results))

    def rank(arm: str) -> tuple[bool, float]:
        mean = results.arms[arm].gain.mean
        return arm not in first, float("inf") if mean is None else -sign * mean

    chosen = set(sorted(labels, key=rank)[: figures.MOST_LINES])
    rest = len(labels) - len(chosen)
    more = f" {len(chosen)} of {len(labels)} arms: those of the verdict, then the best."
    return [a for a in labels if a in chosen], more if rest else ""


def axis(results: Results) -> str:
    """Return the label of the metric's axis."""
    measure = results.measure
    words = [
        "%" if measures.is_share(measure) else measures.suffix(measure).strip(),
        "" if measure.higher_is_better else measures.best_is(measure),
    ]
    more = ", ".join(w for w in words if w)
    return figures.short(measures.written(measure)) + (f" ({more})" if more else "")


def scale(results: Results) -> float:
    """Return what a value of the metric is multiplied by on its axis."""
    return 100.0 if measures.is_share(results.measure) else 1.0
