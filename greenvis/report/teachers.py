"""Several teachers of one student: how much they contradicted each other, and what weights they
were given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from greenvis.report.arm_results import Teachers
from greenvis.report.facts import CONFLICT, Facts


def teachers(runs: Sequence[Facts]) -> Teachers | None:
    """Return means over runs of their teachers' conflict and learned weights; None where none
    says."""
    conflicts = [c for facts in runs for c in facts.conflicts]
    learned = [facts.teacher_weights for facts in runs if facts.teacher_weights]
    conflict = {
        m: (_mean(c[m][0] for c in conflicts), _mean(c[m][-1] for c in conflicts))
        for m in (CONFLICT if conflicts else ())
    }
    alike = bool(learned) and all(learned[0].keys() == weights.keys() for weights in learned)
    weights = {t: _mean(w[t] for w in learned) for t in (learned[0] if alike else ())}
    parts = {"conflict": conflict, "weights": weights}
    known = {key: value for key, value in parts.items() if value}
    return Teachers.model_validate(known) if known else None


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)
