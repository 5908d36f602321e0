"""Who may import whom: DESIGN's table, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "greenvis"
BELOW_REPORT = {"record", "price", "grid"}
ENGINE = {"technique", "surgery", "views", "trace", "wrap", "registry", "recipe", "yamlfile", "record", "price", "grid",
          "models", "data", "stream", "cache", "knn", "train", "meters"}  # fmt: skip
EVERYBODYS = {"errors", "files", "modes", "ranks", "answers"}
# what is not listed is forbidden; a package may import its own parts
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "failures": set(),
    "files": set(),
    "modes": set(),
    "ranks": set(),
    "herding": set(),
    "answers": set(),
    "trainers": set(),
    "technique": {"answers"},
    "record": set(),
    "grid": set(),
    "price": {"record"},
    "yamlfile": set(),
    "models": {"technique"},
    "data": set(),
    "stream": {"data", "technique"},
    "cache": set(),
    "surgery": {"technique"},
    "trace": {"technique", "surgery"},
    "views": {"technique", "surgery", "trace"},
    "folding": {"technique", "surgery", "views"},
    "knn": {"technique", "views", "trace"},
    "registry": {"technique", "techniques"},
    "techniques": {"technique", "surgery", "trainers", "views", "models", "cache", "herding"},
    "wrap": {"technique", "surgery", "trainers", "models"},
    "recipe": {"technique", "registry", "yamlfile"},
    "meters": BELOW_REPORT,
    "cl_metrics": set(),
    "report": BELOW_REPORT | {"cl_metrics", "yamlfile"},
    "train": {"technique", "wrap", "recipe", "record", "price", "meters", "stream"},
    "testing": {"technique", "wrap", "recipe", "registry", "train", "surgery", "views"},
    "jobs": {"data", "meters", "models", "recipe", "technique"},
    "lineage": BELOW_REPORT | {"jobs", "models", "technique"},
    "subset": {"data", "models", "herding"},
    "stages": {"technique", "surgery", "views", "models", "wrap", "train", "meters", "jobs"},
    "experiment": ENGINE | {"folding", "jobs", "lineage", "stages", "subset"},
    "transfer": set(),
    "rank": ENGINE | {"jobs", "transfer"},
    "sweep": {"jobs", "recipe"},
    "on_ray": {"recipe", "jobs", "experiment"},
    "plan": ENGINE | {"jobs", "experiment", "stages", "subset"},
    "probe": ENGINE | {"experiment", "jobs", "lineage", "sweep"},
    "advise": ENGINE | {"experiment", "jobs", "lineage", "plan", "rank", "report"},
    "bench": ENGINE | {"advise", "experiment", "rank", "testing"},
    "integrations": {"technique", "wrap", "meters"},
    "export": {"jobs", "models", "record", "report", "technique"},
    "__main__": {"cli"},
    "cli": {"failures", "verbs"},
    "verbs": ENGINE
    | {"plan", "experiment", "report", "bench", "export", "rank", "lineage", "probe", "advise", "sweep", "on_ray"},
}
# files that belong to one unit: split only to keep each short
PART_OF = {"cache_files": "cache", "deltas": "wrap", "intact": "wrap", "owners": "wrap", "sources": "data", "transform": "data",
           "weights": "models", "libraries": "models", "plain": "models", "preprocessing": "models",
           "checkpoint": "train", "loggers": "train",
           "recipe_checks": "recipe", "continual": "train", "startup": "experiment",
           "verbs_bases": "verbs", "terminal": "verbs", "verbs_models": "verbs",
           "candidates": "advise", "trials": "advise", "extrapolate": "advise"}  # fmt: skip


def _unit(module: str) -> str:
    first = module.removeprefix("greenvis").lstrip(".").split(".")[0]
    return PART_OF.get(first, first)


def _imports(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names if a.name.split(".")[0] == "greenvis"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "greenvis":
            below = [f"{node.module}.{a.name}" for a in node.names]
            out |= {m if _is_module(m) else str(node.module) for m in below}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import; write the whole name")
    return {m for m in out if m != "greenvis"}


def _is_module(name: str) -> bool:
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_what_lies_below(path: Path) -> None:
    unit = _unit(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert unit in ALLOWED, f"{path}: a new unit; give it a row in the table"
    for module in _imports(path):
        target = _unit(module)
        if target == unit and (unit not in ("techniques", "bench") or _shared(module) or _of_one_benchmark(module, path)):
            continue
        assert target in ALLOWED[unit] | EVERYBODYS or (target == unit and _is_package(module)), (
            f"{unit} may not import {module}"
        )


def _shared(module: str) -> bool:
    """One technique or benchmark never imports another; what several share is a file with an underscore."""
    return module.rpartition(".")[2].startswith("_")


def _of_one_benchmark(module: str, path: Path) -> bool:
    """A benchmark may be a folder."""
    return module.split(".")[1] == "bench" and module.split(".")[2:3] == [path.relative_to(ROOT).with_suffix("").parts[1]]


def _is_package(module: str) -> bool:
    return (ROOT.parent / module.replace(".", "/")).is_dir()


def test_a_technique_is_named_in_its_own_file_only() -> None:
    """No `if technique == "lora"` anywhere: names of techniques are no words of the engine."""
    names = {p.stem for p in (ROOT / "techniques").rglob("*.py") if not p.stem.startswith("_")}
    for path in FILES:
        if path.stem in names or "bench" in path.parts or "testing" in path.parts:
            continue
        words = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        if "report" in path.parts:
            words -= {"mae"}  # there it is the mean absolute error
        assert not (words & names), f"{path} names the technique {words & names}"


@pytest.mark.parametrize(
    "module",
    ["greenvis", "greenvis.record", "greenvis.price", "greenvis.report", "greenvis.registry", "greenvis.recipe", "greenvis.cli",
     "greenvis.meters.track"],
)  # fmt: skip
def test_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_record_needs_the_standard_library_only() -> None:
    for name in ("record", "price", "grid", "errors", "files"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            roots = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for root in roots:
                assert root.split(".")[0] in {*sys.stdlib_module_names, "greenvis"}, f"{name} imports {root}"
