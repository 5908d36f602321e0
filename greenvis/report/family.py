"""The family of the models in a report: which was made from which, and what each cost."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from greenvis.report.runs import Arm
from greenvis.report.shape import Family, Link, Member


def family(arms: list[Arm]) -> Family | None:
    """Return all arms that build on others, with all they build on; None where none does.

    A member's own cost is a mean over seeds; its line's is that with all it was made from, each
    once; None where a part is not known.
    """
    costs: dict[str, dict[Any, float | None]] = defaultdict(dict)
    roles: dict[tuple[str, str], str] = {}
    for arm in arms:
        for run in arm.done.values():
            own = f"{run.name}/{run.arm}"
            if run.uses:
                costs[own][run.seed] = run.training_energy_j.value
            for use in run.uses:
                costs[use.name].setdefault(use.runs, use.energy_j.value)
                for child in use.of or (own,):
                    roles[re.sub(r" seed -?\d+$", "", child), use.name] = use.role
    if not roles:
        return None
    own_j = {name: _mean(list(by.values())) for name, by in costs.items()}
    links = [Link(of=of, on=on, role=role) for (of, on), role in roles.items() if of in own_j]
    on = defaultdict(list)
    for link in links:
        on[link.of].append(link.on)
    members = {}
    for name, own in own_j.items():
        line = [own_j[n] for n in (name, *_above(name, on))]
        line_j = None if None in line else math.fsum(v for v in line if v is not None)
        members[name] = Member(own_j=own, line_j=line_j)
    return Family(members=members, links=links)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _above(name: str, on: Mapping[str, list[str]]) -> list[str]:
    """Return all that a member was made from, each once."""
    ancestors: list[str] = []
    left = list(on.get(name, ()))
    while left:
        one = left.pop(0)
        if one not in ancestors and one != name:
            ancestors.append(one)
            left += on.get(one, ())
    return ancestors
