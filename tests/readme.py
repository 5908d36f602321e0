"""Write what is generated anew, `make readme`: parts of the pages in docs/, and the catalogue of techniques."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from greenvis.data.dataset import DOOR
from greenvis.meters.labels import KINDS, SECONDS
from greenvis.report.markup import md
from greenvis.report.overview import markdown, overview
from greenvis.techniques import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BEGIN, END = "<!-- from here on: make readme -->\n", "<!-- to here -->\n"


def techniques() -> dict[str, str]:
    """Return the first paragraph of each technique's documentation."""
    return {
        name: " ".join(registry.about(name)["doc"].split("\n\n")[0].split())
        for name in registry.names()
    }


def technique_table() -> str:
    """Return what each technique does."""
    rows = "".join(f"| `{name}` | {does} |\n" for name, does in techniques().items())
    return f"| name | what it does |\n|---|---|\n{rows}"


def measured() -> str:
    """Return the overview of the committed reports."""
    return markdown(overview(ROOT / "reports"), beside=DOCS)


def data_table() -> str:
    """Return the data sets that recipes can name, as their classes say."""
    lines = ["| name | source | licence | images |", "|---|---|---|---|"]
    for name in DOOR.names():
        cls = DOOR.find(name)
        form = f"{name}:{cls.argument}" if cls.argument else name
        size = ", ".join(f"{n:,} {split}" for split, n in cls.size.items()) or "as the files have"
        source = re.sub(r"(https://[^\s,)]+)", r"<\1>", md(cls.source).replace("\\", ""))
        lines.append(f"| `{form}` | {source} | {md(cls.licence)} | {size} |")
    return "\n".join(lines) + "\n"


def seconds_table() -> str:
    """Return what a label of each kind takes a person."""
    table = json.loads(SECONDS.read_text())
    lines = ["| label | seconds, central (low–high) | source |", "|---|---|---|"]
    for kind in KINDS:
        s = table[kind]
        lines.append(
            f"| {kind} | {s['central']:g} ({s['low']:g}–{s['high']:g}) | {md(s['source'])} |"
        )
    return "\n".join(lines) + "\n"


PARTS: dict[str, tuple[Callable[[], str], ...]] = {
    "techniques.md": (technique_table,),
    "measured.md": (measured,),
    "data.md": (data_table, seconds_table),
}


def generated(text: str) -> list[str]:
    """Return the generated parts of a page, in order."""
    return [part.partition(END)[0] for part in text.split(BEGIN)[1:]]


def main() -> None:
    """Replace them all."""
    registry.CATALOGUE.write_text(registry.catalogue())
    for name, parts in PARTS.items():
        head, *rest = (DOCS / name).read_text().split(BEGIN)
        for part, make in zip(rest, parts, strict=True):
            head += BEGIN + make() + END + part.partition(END)[2]
        (DOCS / name).write_text(head)


if __name__ == "__main__":
    main()
