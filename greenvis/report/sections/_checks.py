"""What checks the energy, and what disturbed it, in sentences."""

from __future__ import annotations

from greenvis.report import formatting
from greenvis.report.formatting import si
from greenvis.report.shape import Check, Results

WAITING = 0.1  # of the CPU time, from which on waiting is said


def checks(results: Results) -> list[str]:
    """Say what a second meter read, and what others took of the machine."""
    out = _codecarbon([c for c in results.crosscheck if c.ratio is not None])
    if results.steal_s is not None and results.cpu_s:
        stolen, used = (formatting.duration(results.steal_s), formatting.duration(results.cpu_s))
        out.append(
            f"Time stolen by the machine's other guests: {stolen} beside {used} of CPU time."
        )
    if results.waiting_s > WAITING * (results.cpu_s or 0.0):
        out.append(
            f"For {formatting.duration(results.waiting_s)} no processor worked for the runs: "
            "others had it, or data was waited for. Memory held meanwhile is "
            f"{si(results.waiting_ram_j, 'J')} of their energy; on a quiet machine it is less."
        )
    return out


def _codecarbon(checks: list[Check]) -> list[str]:
    """Return what codecarbon says of all runs together, and each run it departs on."""
    if not checks:
        return ["No cross-check by codecarbon was recorded."]
    ratios = [c.ratio for c in checks if c.ratio is not None]
    outside = [c for c in checks if c.within_band is False]
    unknown = sum(c.within_band is None for c in checks)
    where = f"{len(outside)} of them OUTSIDE our band" if outside else "all within our band"
    out = [
        f"codecarbon ran beside {len(checks)} run(s) and read {formatting.figures(min(ratios))} to "
        f"{formatting.figures(max(ratios))} "
        f"times our energy, {where if not unknown else where + f' ({unknown} without)'}. Without a "
        "live counter it, too, "
        "multiplies CPU time by watts, by default the same 4 W: this checks the observation and "
        "the sums, not the watts."
    ]
    out += [
        f"codecarbon on {c.arm}, seed {c.seed}: {si(c.energy_j, 'J')} against our "
        f"{si(c.own_j, 'J')} "
        f"({formatting.figures(c.ratio or 0.0)} times), OUTSIDE our band."
        for c in outside[:20]
    ]
    return out + ([f"… and {len(outside) - 20} more outside."] if len(outside) > 20 else [])
