"""What checks the energy, and what disturbed it, in sentences."""

from __future__ import annotations

from greenvis.report import formatting
from greenvis.report.formatting import si
from greenvis.report.shape import Check, Results


def checks(results: Results) -> list[str]:
    """Say what a second meter read, and how far the same work is apart."""
    out = _codecarbon([c for c in results.crosscheck if c.ratio is not None])
    if results.steal_s is not None and results.cpu_s:
        stolen, used = (formatting.duration(results.steal_s), formatting.duration(results.cpu_s))
        out.append(
            f"Time stolen by the machine's other guests: {stolen} beside {used} of CPU time."
        )
    return out + _same_network(results)


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


def _same_network(results: Results) -> list[str]:
    """Say how far arms that serve a network of the same MACs and parameters are apart: that much is
    noise here."""
    alike: dict[tuple[float, float], list[str]] = {}
    for a, row in results.rows.items():
        if row.macs and row.params and row.inference_energy_j.value:
            alike.setdefault((row.macs, row.params), []).append(a)
    out = []
    for (macs, params), names in alike.items():
        rows = [results.arms[a] for a in names]
        joules = sorted(r.inference_energy_j.value or 0.0 for r in rows)
        slow = sorted(p50 for r in rows if (p50 := r.latency_s("p50")))
        if len(names) < 2:
            continue
        latency = (
            f" and {si(slow[0], 's')} to {si(slow[-1], 's')} of latency" if len(slow) > 1 else ""
        )
        who = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        out.append(
            f"{who} answer with {si(macs)} MACs and {si(params)} parameters alike, yet read "
            f"{si(joules[0], 'J')} to "
            f"{si(joules[-1], 'J')} per {results.unit}{latency}: where the networks are the "
            "same, this is the noise of timing here, "
            "and smaller differences between other arms mean nothing."
        )
    return out[:5]
