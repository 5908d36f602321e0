"""`greenvis track -- python train.py …`: meter a program nobody can edit. Its children count; its
exit code passes through."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, GreenvisError
from greenvis.meters.phase import Standstill
from greenvis.meters.processes import children
from greenvis.meters.track import Tracker, track

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


def track_command(
    words: Sequence[str], *, name: str | None = None, **options: Any
) -> tuple[int, Tracker]:
    """Run a command to its end under a tracker.

    Signals meant for the command (SIGINT, SIGTERM, SIGHUP) are passed on to it.

    Args:
        words: the program and its arguments.
        name: of the run; by default the program's or the script's.
        options: those of `track`.

    Returns:
        The exit code (128 + n where signal n ended it) and the tracker.

    Raises:
        BadInput: where the command cannot be started; no record is left then.
    """
    if not words:
        raise BadInput("no command was given: greenvis track -- python train.py")
    run = track(name or _name(words), **options, header={"command": list(words)}, quiet=True)
    folder = Path(options.get("dir", "runs")).absolute()
    before = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with _orphans_come_here(), run:
        ours = set(children(os.getpid())) if sys.platform == "linux" else set()
        try:
            process = subprocess.Popen(list(words))
        except (OSError, ValueError) as error:  # a word with a zero byte is a ValueError
            run.stop("failed", str(error))
            _leave_nothing(run.path, before)
            machine = getattr(error, "errno", None) in (
                errno.EMFILE,
                errno.ENFILE,
                errno.ENOMEM,
                errno.EAGAIN,
            )
            raise (GreenvisError if machine else BadInput)(
                f"cannot start '{words[0]}': {getattr(error, 'strerror', None) or error}"
            ) from error
        with _passed_on(process):
            _wait_through_stops(process, run)
            code = process.wait()
        _reap_orphans(run, ours)
        code = code if code >= 0 else 128 - code
        run.fact(exit_code=code)
        if code:
            run.stop("stopped" if code > 128 else "failed", f"the command ended with {code}")
    return code, run


def _leave_nothing(record: Path, before: Path) -> None:
    """Remove the record of a command that never ran, and the folders made for it: those below what
    was there before."""
    record.unlink(missing_ok=True)
    for folder in record.parents:
        if folder == before:
            return
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _wait_through_stops(process: subprocess.Popen[Any], run: Tracker) -> None:
    """Return when the command has ended; what passes while it is stopped is not charged to it."""
    if sys.platform != "linux":
        return
    moved = os.WSTOPPED | os.WCONTINUED
    while (now := os.waitid(os.P_PID, process.pid, os.WEXITED | moved | os.WNOWAIT)) is not None:
        if now.si_code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
            return
        os.waitid(os.P_PID, process.pid, moved)
        if now.si_code == os.CLD_STOPPED:
            with Standstill(run):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WCONTINUED | os.WNOWAIT)


def _name(words: Sequence[str]) -> str:
    """Return a run name from a command: the script's, not the interpreter's."""
    scripts = [w for w in words[1:] if w.endswith((".py", ".sh"))]
    return os.path.splitext(os.path.basename(scripts[0] if scripts else words[0]))[0] or "command"


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Hand signals on to the command, and wait for what it makes of them."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def ignore(number: int, frame: object) -> None:
        """A terminal sends SIGINT to the command itself, too."""

    before = {}
    for number in (
        (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)
    ):
        before[number] = signal.signal(number, forward)
    before[signal.SIGINT] = signal.signal(
        signal.SIGINT, ignore if sys.stdin and sys.stdin.isatty() else forward
    )
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _orphans_come_here() -> Iterator[None]:
    """Have the kernel give us processes whose parent ended, so that what they use is counted to
    their end."""
    libc = None
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            libc = ctypes.CDLL(None)
            libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        if libc is not None:
            libc.prctl(_SUBREAPER, 0, 0, 0, 0)


def _reap_orphans(run: Tracker, ours: set[int]) -> None:
    """Take in what the command left behind and has ended; say what still runs, and is counted no
    longer."""
    if sys.platform != "linux":
        return
    left = [pid for pid in children(os.getpid()) if pid not in ours]
    for pid in list(left):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        left.remove(pid)
    if left:
        run.note(
            f"the command left {len(left)} processes running (pid {', '.join(map(str, left))}); "
            "counted until it ended"
        )
