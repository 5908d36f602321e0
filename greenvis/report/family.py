"""The family of the models in a report: which was made from which, and what each cost, drawn as a
tree."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from greenvis.report import figures, formatting
from greenvis.report.arms import Arm
from greenvis.report.figures import Drawing, short
from greenvis.report.reuse import use_energy, uses_of

MOST_ROWS = 24  # models that a figure can hold
_INDENT = 0.06  # of the width, a generation


def family(arms: list[Arm]) -> dict[str, Any] | None:
    """Return {"members", "links"} of all arms that build on others, with all they build on; None
    where none does.

    members.NAME: own_j, what it cost, a mean over seeds; line_j, the same with all it was made
    from, each once; null where a part is not known. links: [{"of", "on", "role"}], a child and what
    it builds on.
    """
    costs: dict[str, dict[Any, float | None]] = defaultdict(dict)
    links: dict[tuple[str, str], str] = {}
    for arm in arms:
        for run in arm.done.values():
            uses = uses_of(run).values()
            own = f"{run.name}/{run.arm}"
            if uses:
                costs[own][run.seed] = run.training_energy_j.value
            for use in uses:
                name = str(use.get("name"))
                costs[name].setdefault(repr(use.get("runs")), use_energy(use).value)
                for child in use.get("of") or [own]:
                    links[re.sub(r" seed -?\d+$", "", str(child)), name] = str(use.get("role"))
    if not links:
        return None
    own_j = {name: _mean(list(by.values())) for name, by in costs.items()}
    listed_links = [
        {"of": of, "on": on, "role": role} for (of, on), role in links.items() if of in own_j
    ]
    on = defaultdict(list)
    for link in listed_links:
        on[link["of"]].append(link["on"])
    members = {}
    for name, own in own_j.items():
        line = [own_j[n] for n in (name, *_above(name, on))]
        members[name] = {
            "own_j": own,
            "line_j": None if None in line else math.fsum(v for v in line if v is not None),
        }
    return {"members": members, "links": listed_links}


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


def tree(results: dict[str, Any]) -> Drawing | None:
    """The family, a line a model, below what it was made from: what it cost, and what its whole
    line cost."""
    section = results.get("family")
    if not section:
        return None
    on: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, list[str]] = defaultdict(list)
    for link in section["links"]:
        on[link["of"]].append(link["on"])
        sources[link["of"]].append(f"{link['role']} {link['on']}")
    order = _order(list(section["members"]), on)
    places = {
        name: (_INDENT * _generation(name, on, ()), -row)
        for row, name in enumerate(order[:MOST_ROWS])
    }
    figure, [ax] = figures.canvas(height=0.5 + 0.27 * len(places))
    for name, (x, y) in places.items():
        for above in (n for n in on[name] if n in places):
            x0, y0 = places[above]
            ax.plot([x0, x0, x - 0.01], [y0 - 0.35, y, y], color=figures.MUTED, lw=1.0)
        text = (
            f"{short(name.removeprefix(str(results['name']) + '/'), 28)}: "
            f"{_cost(section['members'][name])}"
        )
        ax.text(x, y, text, ha="left", va="center", color=figures.INK)
    ax.set_xlim(-0.02, 1)
    ax.set_ylim(0.5 - len(places), 0.5)
    ax.axis("off")
    rest = len(order) - len(places)
    caption = (
        "Each below what it was made from. Own cost, then that of the whole line, each ancestor "
        "counted once; means over seeds."
    )
    caption += f" {rest} more are not drawn." if rest else ""
    lines = [
        f"{n} ({_cost(section['members'][n])})"
        + (f" from {' and '.join(sources[n])}" if sources[n] else "")
        for n in order
    ]
    return figures.save(
        figure, "family", "What was made from what", "; ".join(lines) + ". " + caption, caption
    )


def _order(names: list[str], on: Mapping[str, list[str]]) -> list[str]:
    """Return the members, each behind all that it was made from and as near to it as can be."""
    made: list[str] = []

    def visit(name: str) -> None:
        if name not in made and all(
            parent in made or parent not in names for parent in on.get(name, ())
        ):
            made.append(name)
            for child in (n for n in names if name in on.get(n, ())):
                visit(child)

    for name in names:
        visit(name)
    return made + [n for n in names if n not in made]


def _generation(name: str, on: Mapping[str, list[str]], below: tuple[str, ...]) -> int:
    """Return how many ancestors stand above a member, along the longest line."""
    parents = [p for p in on.get(name, ()) if p not in below]
    return 1 + max(_generation(p, on, (*below, name)) for p in parents) if parents else 0


def _cost(member: Mapping[str, Any]) -> str:
    own, line = (
        formatting.si(member[k], "J") if member[k] is not None else "not known"
        for k in ("own_j", "line_j")
    )
    return own if member["own_j"] == member["line_j"] else f"{own}, line {line}"
