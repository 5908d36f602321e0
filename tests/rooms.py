"""The rooms of the house, read off the imports; `make map` draws them into CONTRIBUTING.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent / "greenvis"
# a room may import those named, errors and plugins; what is not named is forbidden
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "plugins": set(),
    "tasks": set(),
    "core": {"tasks"},
    "meters": {"core", "tasks"},
    "data": {"core"},
    "models": {"core", "tasks"},
    "techniques": {"core", "data", "models", "tasks"},
    "experiment": {"core", "data", "meters", "models", "tasks", "techniques"},
    "report": {"core", "meters", "tasks"},
    "planning": {"core", "data", "experiment", "meters", "models", "report", "tasks"},
    "integrations": {"core", "experiment", "meters", "models", "report", "tasks"},
    "testing": {"core", "data", "meters", "models", "report", "tasks"},
    "bench": {
        "core", "data", "experiment", "meters", "models", "planning", "report", "tasks",
        "techniques", "testing",
    },
    "cli": {
        "bench", "core", "data", "experiment", "integrations", "meters", "models", "planning", "report",
        "tasks", "techniques",
    },
    "__main__": {"cli"},
}  # fmt: skip
MOST_ROOMS, MOST_FLOORS = 16, 9
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@cache
def imports(path: Path) -> frozenset[str]:
    """What a file imports as it runs, sooner or later; what only type checkers read is left out."""
    out: set[str] = set()
    tree = ast.parse(path.read_text())
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and is_for_types(n)]
    for_types = {id(below) for n in checked for body in n.body for below in ast.walk(body)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names if a.name.split(".")[0] == "greenvis"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "greenvis":
            below = [f"{node.module}.{a.name}" for a in node.names]
            out |= {m if is_module(m) else str(node.module) for m in below}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import; write the whole name")
    return frozenset(out - {"greenvis"})


def is_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room_of(module: str) -> str:
    return module.split(".")[1]


@cache
def floor(room: str) -> int:
    """Return the floor a room stands on: one above the highest of those it imports."""
    return 1 + max((floor(below) for below in ROOMS[room]), default=0)


def purpose(room: str) -> str:
    """Return the first sentence of what a room says of itself."""
    path = ROOT / room / "__init__.py" if (ROOT / room).is_dir() else ROOT / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def picture() -> str:
    """Return the rooms by floor, the highest first, with what each imports directly."""
    lines = ["| floor | room | what it is | imports |", "|---|---|---|---|"]
    for room in sorted(ROOMS, key=lambda r: (-floor(r), r)):
        # what a room below imports already is not named again
        indirect = {far for near in ROOMS[room] for far in ROOMS[near]}
        direct = ", ".join(sorted(ROOMS[room] - indirect)) or "–"
        lines.append(f"| {floor(room)} | `{room}` | {purpose(room)} | {direct} |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- from here on: make map -->\n", "<!-- to here -->"


def main() -> None:
    """Draw the rooms into CONTRIBUTING.md anew."""
    path = ROOT.parent / "CONTRIBUTING.md"
    head, _, rest = path.read_text().partition(BEGIN)
    path.write_text(head + BEGIN + picture() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
