"""`greenvis bench estimate`: how far estimates of accuracy without labels are off, on mild and on
hard shifts of finished runs' own tests. Seconds per run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from greenvis.bench import _output
from greenvis.bench._options import Out
from greenvis.data.changes import Changed, parse
from greenvis.data.draws import Draw
from greenvis.errors import BadInput
from greenvis.experiment.answers import Answers
from greenvis.planning.estimate import METHODS, compared
from greenvis.planning.saved import Saved

MIX = "class mix"
SHIFTS: dict[str, tuple[str, ...]] = {
    "mild": (
        "plain", "noise:0.05", "noise:0.1", "blur:0.5", "contrast:0.7", "brightness:0.1",
        "rotate:10",
    ),
    "hard": (
        "noise:0.3", "blur:2", "contrast:0.3", "brightness:0.4", "rotate:45", "invert",
        "texture:0.5",
    ),
    MIX: ("imbalance:10",),
}  # fmt: skip
TARGET = 5.0  # points that an estimate may be off on a mild shift


def run(
    runs: Annotated[
        list[str], typer.Option("--run", metavar="RUN", help="a finished run's folder; several")
    ],
    out: Out = None,
) -> dict[str, Any]:
    """Return {"rows": [{"run", "shift", "strength", "accuracy", errors by method}], "summary"}:
    errors are estimate less measured accuracy, in points.

    Args:
        runs: Finished runs; the labelled images of each are those it held out.
        out: A folder to write report.md and results.json to.

    Raises:
        BadInput: For a run without images held out: its own test may not be source and target.
    """
    rows: list[dict[str, Any]] = []
    sizes: set[int] = set()
    for folder in runs:
        saved = Saved(folder)
        if saved.data.held_out is None:
            raise BadInput(
                f"{folder}: its recipe holds no images out, and estimates need labelled ones that "
                "are not the test: set data.held_out, such as 500"
            )
        source = saved.answers(saved.data.held_out)
        sizes.add(len(source.labels))
        for strength, shifts in SHIFTS.items():
            for shift in shifts:
                target = _answers(saved, shift)
                one = compared("held_out", source, target)["measured"]
                errors = {m: round(100 * e, 2) for m, e in one["errors"].items()}
                row = {"run": folder, "shift": shift, "strength": strength}
                rows.append({**row, "accuracy": round(100 * one["accuracy"], 2), **errors})
    result = {"rows": rows, "summary": _summary(rows), "held_out": sorted(sizes)}
    if out is not None:
        _output.write(out, result, _page(result, len(runs)))
    return result


def _answers(saved: Saved, shift: str) -> Answers:
    """Return answers to the run's own test as a change shows it, or with a long tail of classes."""
    if (change := parse(shift)) is not None:
        return saved.answers(Changed(saved.data.test, change))
    every = saved.answers(saved.data.test)
    ratio = float(shift.partition(":")[2])
    rows = Draw(0, 0).long_tail(every.labels, ratio)
    return Answers(every.logits[rows], None, every.labels[rows])


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the errors come to, by strength and method."""
    out = []
    for strength in SHIFTS:
        for method in METHODS:
            errors = [row[method] for row in rows if row["strength"] == strength]
            sizes = [abs(e) for e in errors]
            out.append({
                "strength": strength,
                "method": method,
                "mean_error": round(math.fsum(sizes) / len(sizes), 2),
                "worst": max(errors, key=abs),
                "within": sum(size <= TARGET for size in sizes),
                "of": len(sizes),
            })  # fmt: skip
    return out


def _page(result: Mapping[str, Any], runs: int) -> str:
    summary, rows = result["summary"], result["rows"]
    mild = [s for s in summary if s["strength"] == "mild"]
    best = min(mild, key=lambda s: s["mean_error"])
    failures = [
        f"- {row['shift']} ({row['strength']}): measured {row['accuracy']:.1f} %; "
        + ", ".join(f"{m.replace('_', ' ')} {row[m]:+.1f}" for m in METHODS if _fails(row[m]))
        for row in rows
        if any(_fails(row[m]) for m in METHODS)
    ]
    words = {m: m.replace("_", " ") for m in METHODS}
    mixed = next(s for s in summary if (s["strength"], s["method"]) == (MIX, best["method"]))
    verdict = (
        f"On mild shifts, {words[best['method']]} is nearest: {best['mean_error']:.1f} points off "
        f"on average, within {TARGET:g} points on {best['within']} of {best['of']}; "
        + "; ".join(
            f"{words[s['method']]} {s['within']} of {s['of']}" for s in mild if s is not best
        )
        + f". Where classes are of other frequencies than in the source, {words[best['method']]} "
        f"is {mixed['mean_error']:.1f} points off."
    )
    means = ("| strength | method | mean error | worst | within |", "|---|---|---|---|---|")
    head = ("shift", "strength", "accuracy", *METHODS)
    return "\n".join([
        "# Accuracy without labels: how far estimates are off",
        "",
        verdict,
        "",
        f"`greenvis bench estimate --run RUN …`, {runs} run(s), "
        f"{', '.join(map(str, result['held_out']))} labelled images held "
        "out from each one's training, of the source alone. Points: estimate less measured "
        "accuracy, on the run's own test as each change shows it.",
        "",
        *means,
        *(
            f"| {s['strength']} | {words[s['method']]} | {s['mean_error']:.1f} | {s['worst']:+.1f} "
            f"| {s['within']} of {s['of']} |"
            for s in summary
        ),
        "",
        f"## Failures: more than {TARGET:g} points off",
        "",
        *(failures or ["None."]),
        "",
        "## All",
        "",
        "| " + " | ".join(words.get(h, h) for h in head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(_shown(row[h]) for h in head) + " |" for row in rows),
        "",
    ])  # fmt: skip


def _fails(error: float) -> bool:
    return abs(error) > TARGET


def _shown(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
