"""Models that can be switched after training (thresholds of early exits): what each setting reaches
and costs."""

from __future__ import annotations

import math

from greenvis.report import stats
from greenvis.report.arm_results import Setting
from greenvis.report.facts import Operated
from greenvis.report.runs import Arm

FIRST = "never"  # the setting the others are compared to; where it is absent, the first


def settings(arm: Arm) -> list[Setting]:
    """Return an entry for each setting, means over finished seeds; [] where the arm has none."""
    seeds = [run.facts.settings for run in arm.finished.values()]
    out = []
    for name in dict.fromkeys(name for settings in seeds for name in settings):
        both = [(of[name], of.get(FIRST, next(iter(of.values())))) for of in seeds if name in of]
        own = [point for point, _ in both]
        energy = _mean([_ratio(a.inference_energy_j, b and b.inference_energy_j) for a, b in both])
        macs = _mean([_ratio(a.macs, b and b.macs) for a, b in both])
        accuracies = {i: a.accuracy for i, a in enumerate(own) if a.accuracy is not None}
        out.append(
            Setting(
                setting=name,
                accuracy=stats.summary(accuracies),
                inference_energy_j=_mean([a.inference_energy_j for a in own]),
                energy_ratio=energy,
                energy_spread=_mean([a.spread for a in own]),
                macs=_mean([a.macs for a in own]),
                macs_ratio=macs,
                realised=_realised(energy, macs),
                exits=_shares([a.exits for a in own if a.exits]),
                **_drawn(own),
            )
        )
    return out


def _drawn(own: list[Operated]) -> dict[str, float]:
    """Return what is known of settings by which images are drawn."""
    means = {k: _mean([getattr(a, k) for a in own]) for k in ("calls", "class_entropy")}
    return {k: v for k, v in means.items() if v is not None}


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _realised(energy: float | None, macs: float | None) -> float | None:
    """The energy saved as a share of the MACs saved; None where next to nothing was to be saved."""
    if energy is None or macs is None or macs >= 0.98:
        return None
    return (1 - energy) / (1 - macs)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def _shares(tallies: list[list[float]]) -> list[float]:
    if not tallies or len({len(t) for t in tallies}) > 1:
        return []
    total = sum(map(sum, tallies))
    return [sum(t[k] for t in tallies) / total for k in range(len(tallies[0]))] if total else []
