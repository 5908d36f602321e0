"""How arms look, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from greenvis.report import figures, formatting
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


def axis(results: Results) -> str:
    """Return the label of the metric's axis."""
    unit = " (%)" if formatting.share(results.metric) else ""
    return f"{figures.short(results.metric)}{unit}"
