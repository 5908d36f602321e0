"""The family as a tree: which model was made from which, and what each cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from greenvis.report import figures, formatting
from greenvis.report.figures import Drawing, short
from greenvis.report.shape import Member, Results

MOST_ROWS = 24  # models that a figure can hold
_INDENT = 0.06  # of the width, a generation


def tree(results: Results) -> Drawing | None:
    """The family, a line a model, below what it was made from: what it cost, and what its whole
    line cost."""
    family = results.family
    if not family:
        return None
    on: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, list[str]] = defaultdict(list)
    for link in family.links:
        on[link.of].append(link.on)
        sources[link.of].append(f"{link.role} {link.on}")
    order = _order(list(family.members), on)
    positions = {
        name: (_INDENT * _generation(name, on, ()), -row)
        for row, name in enumerate(order[:MOST_ROWS])
    }
    figure, [ax] = figures.canvas(height=0.5 + 0.27 * len(positions))
    for name, (x, y) in positions.items():
        for above in (n for n in on[name] if n in positions):
            x0, y0 = positions[above]
            ax.plot([x0, x0, x - 0.01], [y0 - 0.35, y, y], color=figures.MUTED, lw=1.0)
        text = (
            f"{short(name.removeprefix(str(results.name) + '/'), 28)}: "
            f"{_cost(family.members[name])}"
        )
        ax.text(x, y, text, ha="left", va="center", color=figures.INK)
    ax.set_xlim(-0.02, 1)
    ax.set_ylim(0.5 - len(positions), 0.5)
    ax.axis("off")
    rest = len(order) - len(positions)
    caption = (
        "Each below what it was made from. Own cost, then that of the whole line, each ancestor "
        "counted once; means over seeds."
    )
    caption += f" {rest} more are not drawn." if rest else ""
    lines = [
        f"{n} ({_cost(family.members[n])})"
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


def _cost(member: Member) -> str:
    own, line = (
        formatting.si(value, "J") if value is not None else "not known"
        for value in (member.own_j, member.line_j)
    )
    return own if member.own_j == member.line_j else f"{own}, line {line}"
