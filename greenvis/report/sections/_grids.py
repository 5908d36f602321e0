"""Tables that only some reports have: predictions, kept outputs, several teachers."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import formatting
from greenvis.report.arm_results import ArmResults, Planned
from greenvis.report.blocks import Grid
from greenvis.report.facts import CONFLICT
from greenvis.report.formatting import si
from greenvis.report.shape import Results

Said = tuple[str, Grid]  # what the table's readers must know, and the table


def predicted(results: Results) -> Said | None:
    """Return the plan's prediction beside what it came to; None where no plan was made."""
    rows = tuple((a, *_forecasts(p)) for a, row in results.rows.items() if (p := row.predicted))
    head = (
        "Arm",
        "Energy: predicted → actual",
        "Time: predicted → actual",
        "FLOPs: predicted → actual",
    )
    text = (
        "Training and evaluation of one seed, as `greenvis plan` put it before from a few steps, "
        "and the mean over seeds after; × is actual ÷ predicted. Grams follow the joules. A busy "
        "machine stretches time more than energy."
    )
    return (text, Grid(head, rows, "Predicted and actual")) if rows else None


def _forecasts(p: dict[str, Planned]) -> tuple[str, str, str]:
    return (
        _forecast(p.get("energy_j"), lambda value: si(value, "J")),
        _forecast(p.get("wall_s"), formatting.duration),
        _forecast(p.get("flops"), si),
    )


def _forecast(f: Planned | None, form: Callable[[float], str]) -> str:
    if f is None:
        return formatting.MISSING
    ratio = "" if f.ratio is None else f", ×{formatting.figures(f.ratio)}"
    inside = "inside the band" if f.inside else "OUTSIDE the band"
    return f"{form(f.value)} ({form(f.low)} to {form(f.high)}) → {form(f.actual)}{ratio}, {inside}"


def outputs(results: Results) -> Said | None:
    """Return what arms read back instead of computing it; None where none did."""
    rows = tuple(
        (a, str(o.part), si(o.misses), si(o.hits), si(o.earlier), si(o.bytes, "B"))
        for a, row in results.rows.items()
        for o in row.outputs
    )
    head = ("Arm", "Outputs of", "Computed", "Read back", "… computed by an earlier run", "On disk")
    text = (
        "Images whose outputs of a frozen part were computed, and read back from disk instead; "
        "means over seeds, of the start that finished. What an earlier run computed is paid for in "
        "that run's record, not in this arm's energy."
    )
    return (text, Grid(head, rows, "Kept outputs")) if rows else None


def teachers(results: Results) -> Said | None:
    """Return how far teachers contradicted each other; None where no arm had several."""
    rows = tuple((a, *_conflict(row)) for a, row in results.rows.items() if row.teachers)
    head = (
        "Arm",
        "Choose other classes",
        "Divergence (nats)",
        "Cosine of their pulls",
        "Learned weights",
    )
    text = (
        "Between each two teachers, in the first epoch → in the last, means over seeds: how often "
        "they choose other classes, how far their softened answers are apart, and the cosine "
        "between the gradients that each alone would give the student's logits (below 0 they pull "
        "it apart)."
    )
    return (text, Grid(head, rows, "Several teachers")) if rows else None


def _conflict(row: ArmResults) -> list[str]:
    conflict = row.teachers.conflict if row.teachers else {}
    weights = row.teachers.weights if row.teachers else {}
    learned = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
    return [*(_span(conflict.get(m)) for m in CONFLICT), learned or "not learned"]


def _span(ends: tuple[float, float] | None) -> str:
    return formatting.MISSING if ends is None else " → ".join(formatting.fixed(v, 2) for v in ends)
