"""What a section of a report consists of: blocks, shown alike as HTML and as Markdown.

Text in them is plain. Whatever it holds (names come from strangers) is escaped where it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from greenvis.report.figures import Drawing


@dataclass(frozen=True)
class Strong:
    """Words in bold."""

    text: str
    kind: ClassVar[str] = "strong"


@dataclass(frozen=True)
class Badge:
    """How a figure is known: "measured", "estimated", …"""

    text: str
    kind: ClassVar[str] = "badge"


@dataclass(frozen=True)
class Link:
    """A file beside the report."""

    text: str
    path: str
    kind: ClassVar[str] = "link"


Inline = str | Strong | Badge | Link


@dataclass(frozen=True)
class Paragraph:
    """Text. look: "plain" or "note" (small)."""

    text: tuple[Inline, ...]
    look: str = "plain"
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Facts:
    """Short statements side by side."""

    items: tuple[tuple[Inline, ...], ...]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Heading:
    """A heading below the section's own."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Bullets:
    """A list. look: "plain" or "others" (small)."""

    items: tuple[str, ...]
    look: str = "plain"
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column names the row. label: what it is, for screen readers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    label: str
    kind: ClassVar[str] = "grid"


@dataclass(frozen=True)
class Cell:
    """A figure of an arm: its text, a second line, how it is known, whether a difference is shown;
    a mark ("●"), what rows are sorted by, and what a pointer over it reads."""

    text: str
    sub: str = ""
    badge: str | None = None
    shown: bool = False
    mark: str = ""
    value: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class ArmRow:
    """A row of a table of arms. series: the number of its colour in all figures."""

    arm: str
    status: str
    baseline: bool
    techniques: str
    cells: tuple[Cell, ...]
    series: int | None = None
    position: int = 0


@dataclass(frozen=True)
class ArmTable:
    """A table with one row per arm. id: unique within the page. note: what holds for all of it.
    brief: a line per arm, sortable."""

    id: str
    caption: str
    titles: tuple[str, ...]
    rows: tuple[ArmRow, ...]
    note: str = ""
    brief: bool = False
    kind: ClassVar[str] = "arms"


@dataclass(frozen=True)
class Tile:
    """A figure in large letters: what it is, the figure, and what it rests on."""

    label: str
    value: str
    sub: str


@dataclass(frozen=True)
class Lead:
    """The first screen: one sentence, tiles, how sure they are, and a figure beside them."""

    sentence: str
    tiles: tuple[Tile, ...]
    sure: tuple[str, ...]
    drawing: Drawing | None
    kind: ClassVar[str] = "lead"


@dataclass(frozen=True)
class Drawings:
    """Figures."""

    items: tuple[Drawing, ...]
    kind: ClassVar[str] = "drawings"


@dataclass(frozen=True)
class Code:
    """Text as it is: a command, a recipe. wrap: long lines are broken where they are shown."""

    text: str
    label: str
    wrap: bool = False
    kind: ClassVar[str] = "code"


Block = Lead | Paragraph | Facts | Heading | Bullets | Grid | ArmTable | Drawings | Code


def paragraph(*text: Inline, look: str = "plain") -> Paragraph:
    """Return a paragraph of those pieces."""
    return Paragraph(text, look)
