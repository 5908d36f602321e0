"""Run a hostile input as a user would: in a process of its own, held to a time and a size."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

GROWTH = 200 * 2**20  # bytes of address space beyond what the command takes without the input


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def greenvis(
    *words: str | os.PathLike[str],
    cwd: Path,
    memory: int | None = None,
    env: dict[str, str] | None = None,
) -> Said:
    """Run `greenvis` there and return what it said. No traceback may reach the user; it must end
    within a minute."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    done = subprocess.run(
        [sys.executable, "-m", "greenvis", *map(str, words)], cwd=cwd, capture_output=True,
        timeout=60, check=False,
        preexec_fn=limit, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]),
        **(env or {})},
    )  # fmt: skip
    said = Said(
        done.returncode,
        done.stdout.decode("utf-8", "replace"),
        done.stderr.decode("utf-8", "replace"),
    )
    assert "Traceback" not in said.err, said.err
    return said


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Return what lies in a folder: contents of files, targets of links, None for folders."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }
