"""Run greenvis again and again, each time ended without a word at another of its writes; then once
more, undisturbed.

python killed.py RECIPE FIRST:STEP:KINDS …: in folders of their own below the current one. KINDS, by
commas, are the writes that count, of WRITES: renames, removals and lines of a record. Prints a JSON
line for each: at which write it ended and at what, the exit code of the run after it, what that
said, and what lies there then. The first line is of a run that nobody ended.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import brief

from greenvis.cli import main as cli
from greenvis.meters import record

FINISHED = 77
WRITES = ("replace", "rename", "unlink", "remove", "write")


def ending_at(number: int, kinds: Iterable[str]) -> None:
    """Make this process end itself, as by kill -9, just before its write of that number."""
    left = number

    def counted(name: str) -> None:
        plain: Callable[..., Any] = getattr(os, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                Path("ended").write_bytes(
                    f"{name} {args[-1] if name in ('replace', 'rename') else args[0]}".encode()
                )
                os._exit(9)
            return plain(*args, **kwargs)

        setattr(os, name, write)

    for name in kinds:
        counted(name)


def run(
    folder: Path, recipe: str, number: int = 0, kinds: Iterable[str] = WRITES
) -> tuple[int, str]:
    """Run the recipe in a process of its own; return its exit code and what it said."""
    child = os.fork()
    if not child:
        os.chdir(folder)
        said = io.StringIO()
        if number:
            ending_at(number, kinds)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = cli.main(["run", recipe])
        if not number:
            Path("said").write_text(said.getvalue())
            Path("modules").write_text("\n".join(sys.modules))
        os._exit(FINISHED if number and not code else code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = folder / "said"
    return code, said.read_text() if said.exists() else ""


def left(folder: Path) -> dict[str, Any]:
    """Return what a run left: digests of weights, accuracies and losses, and the figures of its
    report."""
    weights = {
        str(p.relative_to(folder)): _digest(p)
        for p in sorted(folder.glob("runs/*/*/*/model.safetensors"))
    }
    marks = {
        str(p.relative_to(folder)): json.loads(p.read_text())
        for p in sorted(folder.glob("runs/*/*/*/done.json"))
    }
    results = json.loads((folder / "reports" / "tiny" / "results.json").read_text())
    return {
        "weights": weights,
        "marked": [*marks],
        "fitting": all(
            mark["weights"]
            == hashlib.sha256(
                Path(folder, path).with_name("model.safetensors").read_bytes()
            ).hexdigest()
            for path, mark in marks.items()
        ),
        "finished": sorted(
            f"{r.header['name']}/{r.header['arm']}" for r in _records(folder) if r.status == "done"
        ),
        "losses": _losses(folder),
        "reported": {arm: entry["accuracy"]["by_seed"] for arm, entry in results["arms"].items()},
        "litter": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if _litter(p.name)),
    }


def _litter(name: str) -> bool:
    return name.endswith((".part", "-checkpoint.pt")) or name.startswith((".new-", ".old-"))


def _records(folder: Path) -> list[record.Run]:
    return [*record.readable([folder / "runs"])]


def _losses(folder: Path) -> dict[str, dict[str, float]]:
    """Return each arm's loss by epoch, whichever attempt ended it."""
    curves: dict[str, dict[str, float]] = {}
    for run in _records(folder):
        curve = curves.setdefault(f"{run.header['name']}/{run.header['arm']}", {})
        curve.update({str(line["epoch"]): line["loss"] for line in run.logs if "loss" in line})
    return curves


def _digest(path: Path) -> str:
    from safetensors.numpy import (
        load_file,
    )  # the card beside them names a run, which is another each time

    tensors = load_file(path)
    return hashlib.sha256(
        b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
    ).hexdigest()


def tried(recipe: Path, number: int, kinds: Iterable[str] = WRITES) -> dict[str, Any]:
    """Run the recipe, ended at the write of that number (0: not), then once more; return what came
    of it."""
    folder = Path("tried").resolve()
    folder.mkdir()
    for file in recipe.parent.glob("*.yaml"):
        shutil.copy(file, folder)
    ended = run(folder, recipe.name, number, kinds)[0] if number else None
    code, said = run(folder, recipe.name)
    at = (folder / "ended").read_text() if (folder / "ended").exists() else ""
    outcome = {"number": number, "ended": ended, "at": at, "code": code, "said": said}
    for name in (folder / "modules").read_text().split() if not number else ():
        with contextlib.suppress(Exception):
            importlib.import_module(name)  # here, once, not in each run
    gc.freeze()  # nor does each go through what was imported
    outcome |= left(folder)
    shutil.rmtree(folder)
    print(json.dumps(outcome), flush=True)
    return outcome


def main() -> None:
    """See above."""
    brief.measurements()
    recipe = Path(sys.argv[1])
    tried(recipe, 0)
    for loop in sys.argv[2:]:
        first, step, kinds = loop.split(":")
        number = int(first)
        while tried(recipe, number, kinds.split(","))["ended"] != FINISHED:
            number += int(step)
    gc.unfreeze()  # Triton's bindings count what is left at the end


if __name__ == "__main__":
    main()
