"""The family of the models in a report: which was made from which, and what each cost, drawn as a tree."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from greenvis.report import figures, words
from greenvis.report.arms import Arm
from greenvis.report.figures import Drawing, short
from greenvis.report.reuse import use_energy, uses_of

MOST_ROWS = 24  # models of one generation that a figure can hold


def family(listed: list[Arm]) -> dict[str, Any] | None:
    """Return {"members", "links"} of all arms that build on others, with all they build on; None where none does.

    members.NAME: own_j, what it cost, a mean over seeds; line_j, the same with all it was made from, each once; null where a
    part is not known. links: [{"of", "on", "role"}], a child and what it builds on.
    """
    costs: dict[str, dict[Any, float | None]] = defaultdict(dict)
    links: dict[tuple[str, str], str] = {}
    for arm in listed:
        for run in arm.done.values():
            uses = uses_of(run).values()
            own = f"{run.name}/{run.arm}"
            if uses:
                costs[own][run.seed] = run.making_j.value
            for use in uses:
                name = str(use.get("name"))
                costs[name].setdefault(repr(use.get("runs")), use_energy(use).value)
                for child in use.get("of") or [own]:
                    links[re.sub(r" seed -?\d+$", "", str(child)), name] = str(use.get("role"))
    if not links:
        return None
    own_j = {name: _mean(list(by.values())) for name, by in costs.items()}
    listed_links = [{"of": of, "on": on, "role": role} for (of, on), role in links.items() if of in own_j]
    on = defaultdict(list)
    for link in listed_links:
        on[link["of"]].append(link["on"])
    members = {}
    for name, own in own_j.items():
        line = [own_j[n] for n in (name, *_above(name, on))]
        members[name] = {"own_j": own, "line_j": None if None in line else math.fsum(v for v in line if v is not None)}
    return {"members": members, "links": listed_links}


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _above(name: str, on: Mapping[str, list[str]]) -> list[str]:
    """Return all that a member was made from, each once."""
    found: list[str] = []
    left = list(on.get(name, ()))
    while left:
        one = left.pop(0)
        if one not in found and one != name:
            found.append(one)
            left += on.get(one, ())
    return found


def tree(found: dict[str, Any]) -> Drawing | None:
    """The family, ancestors on the left: each model with what it cost, and with what its whole line cost."""
    its = found.get("family")
    if not its:
        return None
    on = defaultdict(list)
    for link in its["links"]:
        on[link["of"]].append(link["on"])
    columns: dict[int, list[str]] = defaultdict(list)
    for name in its["members"]:
        columns[_generation(name, on, ())].append(name)
    rest = sum(max(0, len(names) - MOST_ROWS) for names in columns.values())
    places = {
        name: (column, -(i + 0.5) / len(names[:MOST_ROWS]))
        for column, names in columns.items()
        for i, name in enumerate(names[:MOST_ROWS])
    }
    rows = min(MOST_ROWS, max(map(len, columns.values())))
    figure, [ax] = figures.canvas(width=max(5.2, 2.3 * len(columns)), height=max(1.6, 0.55 * rows))
    for link in its["links"]:
        if link["of"] in places and link["on"] in places:
            (x, y), (x0, y0) = places[link["of"]], places[link["on"]]
            ax.plot([x0, x], [y0, y], color=figures.GRID, lw=1.2, zorder=1)
    for name, (x, y) in places.items():
        member = its["members"][name]
        text = f"{short(name.removeprefix(str(found['name']) + '/'), 24)}\n{_cost(member)}"
        box = {"boxstyle": "round,pad=0.3", "fc": figures.GROUND, "ec": figures.MUTED, "lw": 0.8}
        ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=figures.INK, bbox=box, zorder=2)
    ax.set_xlim(-0.5, max(columns) + 0.5)
    ax.set_ylim(-1, 0)
    ax.axis("off")
    parents = defaultdict(list)
    for link in its["links"]:
        parents[link["of"]].append(f"{link['role']} {link['on']}")
    said = [
        f"{n} ({_cost(m)})" + (f" from {' and '.join(parents[n])}" if parents[n] else "") for n, m in its["members"].items()
    ]
    more = f" {rest} more are not drawn." if rest else ""
    caption = (
        f"Ancestors on the left. Own cost, then that of the whole line, each ancestor counted once; means over seeds.{more}"
    )
    return figures.save(figure, "family", "What was made from what", "; ".join(said) + ". " + caption, caption)


def _generation(name: str, on: Mapping[str, list[str]], below: tuple[str, ...]) -> int:
    """Return how many ancestors stand above a member, along the longest line."""
    parents = [p for p in on.get(name, ()) if p not in below]
    return 1 + max(_generation(p, on, (*below, name)) for p in parents) if parents else 0


def _cost(member: Mapping[str, Any]) -> str:
    own, line = words.si(member["own_j"], "J"), words.si(member["line_j"], "J")
    return own if member["own_j"] == member["line_j"] else f"{own}, line {line}"
