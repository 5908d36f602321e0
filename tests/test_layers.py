"""Who may import whom: the rooms of the house, read off the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import (
    FILES,
    MOST_FLOORS,
    MOST_ROOMS,
    ROOMS,
    ROOT,
    floor,
    imports,
    module_name,
    picture,
    room_of,
)


def test_there_are_few_rooms_and_few_floors() -> None:
    rooms = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(ROOMS)
    assert len(ROOMS) <= MOST_ROOMS

    assert max(map(floor, ROOMS)) <= MOST_FLOORS  # endless where the table has a circle


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_lies_below(path: Path) -> None:
    room = room_of(module_name(path))
    for module in imports(path):
        below = room_of(module)
        assert below in ROOMS[room] | {room, "errors", "plugins"}, f"{room} may not import {module}"
        if below != room:
            private = [part for part in module.split(".")[2:] if part.startswith("_")]
            assert not private or (room == "bench"), f"{module} is {below}'s own"


def test_no_row_of_the_table_is_idle() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in FILES:
        used[room_of(module_name(path))] |= {room_of(m) for m in imports(path)}
    assert {room: below - used[room] for room, below in ROOMS.items() if below - used[room]} == {}


def test_no_circle_among_files() -> None:
    below = {module_name(p): {m for m in imports(p) if m != module_name(p)} for p in FILES}
    done: set[str] = set()
    under_way: list[str] = []

    def visit(module: str) -> None:
        assert module not in under_way, " → ".join([*under_way[under_way.index(module) :], module])
        if module in done or module not in below:
            return
        under_way.append(module)
        for other in below[module]:
            visit(other)
        under_way.pop()
        done.add(module)

    for module in below:
        visit(module)


def _home(module: str) -> tuple[str, ...]:
    """The folder of a technique or benchmark file; a package of its own is its folder."""
    return tuple(module.split(".")[1:-1])


@pytest.mark.parametrize("room", ["techniques", "bench"])
def test_no_technique_and_no_benchmark_imports_another(room: str) -> None:
    """What several of a family share is a file with an underscore; what families share is _shared."""
    for path in FILES:
        if room_of(name := module_name(path)) != room:
            continue
        for module in imports(path):
            if room_of(module) != room or _is_package(module):
                continue
            parts, home = module.split("."), _home(module)
            own = tuple(name.split(".")[1:])
            if parts[-1].startswith("_"):
                assert home == own[: len(home)], f"{name} imports {module}"
            else:
                of_one_benchmark = room == "bench" and home == own[: len(home)] != ("bench",)
                assert "_shared" in parts or of_one_benchmark, f"{name} imports {module}"


def _is_package(module: str) -> bool:
    return (ROOT.parent / module.replace(".", "/")).is_dir()


def _techniques() -> set[str]:
    files = (ROOT / "techniques").glob("*/*/*.py")
    return {p.stem for p in files if not p.stem.startswith("_") and p.parts[-3] != "_shared"}


def test_a_technique_is_named_in_its_own_file_only() -> None:
    """No `if technique == "lora"` anywhere: names of techniques are no words of the engine."""
    names = _techniques()
    assert {"lora", "replay", "distill", "early_exit"} <= names
    for path in FILES:
        if path.stem in names or "bench" in path.parts or "testing" in path.parts:
            continue
        words = {
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        if {"report", "tasks"} & {*path.parts}:
            words -= {"mae", "zero_shot"}  # there they are metrics
        if "distill" in path.parts:
            words -= {"ema"}  # there it is a teacher
        assert not (words & names), f"{path} names the technique {words & names}"


@pytest.mark.parametrize(
    "module",
    [
        "greenvis",
        "greenvis.cli.main",
        "greenvis.experiment.recipe",
        "greenvis.meters.pricing",
        "greenvis.meters.record",
        "greenvis.meters.track",
        "greenvis.report",
        "greenvis.techniques.registry",
    ],
)
def test_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "file",
    [
        "errors",
        "core/files",
        "meters/carbon",
        "meters/grid",
        "meters/pricing",
        "meters/record",
        "meters/record_writer",
        "meters/run_names",
        "meters/serving",
    ],
)
def test_record_needs_the_standard_library_only(file: str) -> None:
    for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
        if isinstance(node, ast.Import):
            roots = [a.name for a in node.names]
        else:
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for root in roots:
            known = {*sys.stdlib_module_names, "greenvis"}
            assert root.split(".")[0] in known, f"{file} imports {root}"


def test_the_picture_of_the_rooms_is_drawn_from_their_imports() -> None:
    assert picture() in (ROOT.parent / "CONTRIBUTING.md").read_text(), "run `make map`"
