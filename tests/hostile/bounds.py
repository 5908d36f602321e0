"""Run a hostile input as a user would: in a process of its own, held to CPU seconds and to a size.

`greenvis` asks a server (`served.py`, forked from that of `forked.py`) for it, which has everything
imported and forks: so what an input takes is told from what a start takes, and hundreds of them cost
one start.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from forked import FORKS

GROWTH = 200 * 2**20  # bytes of data beyond what everything imported takes
SECONDS = 10  # of CPU; a bomb takes hours
HANG = 600  # seconds without an end, for who waits and does not compute
_server: Connection | None = None


class Said(NamedTuple):
    """What a command did: its exit code (-n: ended by signal n), what it printed, CPU seconds, and
    by how many bytes it grew."""

    code: int
    out: str
    err: str
    cpu_s: float
    grown: int


def greenvis(
    *words: str | os.PathLike[str],
    cwd: Path,
    growth: int = GROWTH,
    seconds: int = SECONDS,
    env: dict[str, str] | None = None,
) -> Said:
    """Run `greenvis` there and return what it said. No traceback may reach the user.

    growth: bytes that it may grow by, and seconds: of CPU that it may take, beyond which the system
    refuses it, or ends it.
    """
    (said,) = together([words], cwd, growth, seconds, env)
    return said


def together(
    commands: Iterable[Sequence[str | os.PathLike[str]]],
    cwd: Path,
    growth: int = GROWTH,
    seconds: int = SECONDS,
    env: dict[str, str] | None = None,
) -> list[Said]:
    """Run greenvis with each of these words, in processes that begin in the same moment."""
    bounds = {"cwd": str(cwd), "env": env or {}, "growth": growth, "seconds": seconds}
    server = _serving()
    server.send([{"words": [*map(os.fspath, words)], **bounds} for words in commands])
    answers = [Said(**answer) for answer in server.recv()]
    for said in answers:
        assert "Traceback" not in said.err, said.err
        assert said.code >= 0, said
        assert said.grown <= growth, said
    return answers


def _serving() -> Connection:
    global _server
    if _server is None:
        from tests.hostile import served

        _server, end = FORKS.Pipe()
        process = FORKS.Process(target=served.serve, args=(end,))
        process.start()
        atexit.register(process.kill)
    return _server


class OutOfBounds(BaseException):
    """What ran took more CPU seconds than it may; no code of ours catches it."""


@contextmanager
def bounded(seconds: float = SECONDS, growth: int = GROWTH) -> Iterator[None]:
    """Hold what runs within, in this process, to CPU seconds and to growth."""

    def over(number: int, frame: Any) -> None:
        raise OutOfBounds

    _, most = limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGPROF, over)
    resource.setrlimit(resource.RLIMIT_DATA, (data() + growth, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def data() -> int:
    """Return the bytes that the system counts against RLIMIT_DATA, of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmData:")[1].split()[0])


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """Return what lies in a folder: contents of files, targets of links, None for folders and what
    is neither."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(folder.rglob("*"))
    }
