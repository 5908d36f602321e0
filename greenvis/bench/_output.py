"""What benchmarks share: their files and their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis.core import files


def write(out: Path, result: Mapping[str, Any], page: str) -> None:
    """Write results.json and report.md into a folder, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "results.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    files.write(out / "report.md", page)


def draw(
    path: Path, rows: Sequence[Mapping[str, Any]], x: tuple[str, str], y: tuple[str, str], low: int
) -> None:
    """Draw one figure of rows against another, one line per batch size; on the dashed line all that
    was computed less is saved.

    x, y: the key in the rows, and the label. low: where the dashed line begins; it ends at the
    greatest x, or at 1.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.subplots()
    high = max((row[x[0]] for row in rows), default=1) if low else 1
    axes.plot([low, high], [low, high], "--", color="#888888", label="all of it realised")
    for i, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
        points = sorted((row[x[0]], row[y[0]]) for row in rows if row["batch"] == batch)
        axes.plot(*zip(*points, strict=True), marker="osD^vP*"[i % 7], label=f"batch {batch}")
    axes.set_xlabel(x[1])
    axes.set_ylabel(y[1])
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
