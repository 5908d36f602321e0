"""Write what is generated anew, `make readme`: parts of README.md, and the catalogue of techniques."""

from __future__ import annotations

import re
from pathlib import Path

from greenvis.report.overview import markdown, overview
from greenvis.techniques import registry

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- from here on: greenvis overview -->\n", "<!-- to here -->"


def techniques() -> dict[str, str]:
    """Return the first paragraph of each technique's documentation."""
    return {
        name: " ".join(registry.about(name)["doc"].split("\n\n")[0].split())
        for name in registry.names()
    }


def measured() -> str:
    """Return the overview of the committed reports, as the README has it."""
    return markdown(overview(ROOT / "reports"), beside=ROOT)


def main() -> None:
    """Replace them all."""
    registry.CATALOGUE.write_text(registry.catalogue())
    path = ROOT / "README.md"
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    text = head + BEGIN + measured() + END + rest.partition(END)[2]
    table = "".join(f"| `{name}` | {does} |\n" for name, does in techniques().items())
    path.write_text(
        re.sub(
            r"(\| name \| what it does \|\n\|---\|---\|\n)(?:\|.*\n)+", lambda m: m[1] + table, text
        )
    )


if __name__ == "__main__":
    main()
