"""Tutorials: notebooks run cell by cell in a process of their own, and shown with what they print.

As a script it runs one: `python notebooks.py FILE` prints the output of each code cell as JSON.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHELL = "!greenvis "  # begins a cell's line that is a command


def cells(path: Path) -> list[tuple[str, str]]:
    """Return the cells of a notebook: ("markdown" or "code", its text)."""
    notebook = json.loads(path.read_text())
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def outputs(path: Path) -> list[str]:
    """Run a notebook in an empty folder, and return what each code cell printed. Raises
    CalledProcessError, with the traceback on its way to the terminal, where a cell fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, str(path.resolve())],
            cwd=folder,
            env={**env, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


def page(path: Path) -> str:
    """Return a notebook as Markdown, with what it printed."""
    printed = iter(outputs(path))
    lines = []
    for kind, text in cells(path):
        if kind != "code":
            lines += [text, ""]
            continue
        lines += ["```python", text, "```", ""]
        if output := next(printed).rstrip():
            lines += ["```text", output, "```", ""]
    lines += [f"The notebook: `examples/{path.name}`.", ""]
    return "\n".join(lines)


def execute(path: Path) -> list[str]:
    """Run a notebook here, as `outputs` does."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for kind, text in cells(path):
        if kind == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                _execute(text, names)
            printed.append(out.getvalue())
    return printed


def _execute(text: str, names: dict[str, Any]) -> None:
    from greenvis.cli.main import main

    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(SHELL):
            lines[number] = f"__greenvis__({shlex.split(line)[1:]!r})"

    def command(words: list[str]) -> None:
        code = main(words)
        if code:
            raise SystemExit(f"greenvis {shlex.join(words)}: exit code {code}")

    names["__greenvis__"] = command
    tree = ast.parse("\n".join(lines))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        if value is not None:
            print(repr(value))


if __name__ == "__main__":
    print(json.dumps(execute(Path(sys.argv[1]))))
