"""Files that others may have made are read within limits; ours are written whole or not at all,
never through a link.

Standard library only. Everything greenvis reads as text or JSON comes through `read`, everything it
writes through `replacing` (or `write`), `lock` and `own_folder`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, GreenvisError

_MOST_NAME = 80  # characters of a name in that of its part
_PART = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.part", re.DOTALL)
MOST_TEXT = 16 * 2**20  # bytes of a card, a plan, a results file
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def read(path: str | os.PathLike[str], what: str = "file", most: int = MOST_TEXT) -> bytes:
    """Return a file's bytes.

    Args:
        path: a regular file, or a link to one.
        what: what it is, for the message: "recipe".
        most: the largest size to read, in bytes.

    Raises:
        BadInput: where there is none, it is no regular file (a pipe would hang, a device never
        ends), or it is larger.
    """
    try:
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        )
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read the {what} {_printable(path)}: {reason}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(
                f"cannot read the {what} {_printable(path)}: it is {_kind(status.st_mode)}, not a "
                "regular file"
            )
        if status.st_size > most:
            raise BadInput(
                f"cannot read the {what} {_printable(path)}: it has {status.st_size:,} bytes, and "
                f"at most {most:,} are read"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)  # not `most`: that much would be set aside
    finally:
        os.close(handle)


def read_text(path: str | os.PathLike[str], what: str = "file", most: int = MOST_TEXT) -> str:
    """Return a file's text, UTF-8. Raises BadInput as `read` does, and for other encodings."""
    try:
        return read(path, what, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"cannot read the {what} {_printable(path)}: not UTF-8 at byte {error.start}"
        ) from error


def read_json(path: str | os.PathLike[str], what: str = "file", most: int = MOST_TEXT) -> Any:
    """Return a file's JSON. Raises BadInput as `read` does, and for what is not JSON, or is nested
    too deeply."""
    try:
        return json.loads(read(path, what, most))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"cannot read the {what} {_printable(path)}: not JSON: {reason}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new file beside `path`; when the block ends well it takes the place of
    `path`, else it goes.

    A link at `path` is replaced, never followed. The content is on the disk before it takes the
    name. What writers of `path` that were killed left is removed.
    """
    import tempfile  # late: a tracker's start pays for each import

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    held, name = _part(path, tempfile.mkstemp)
    try:
        yield Path(name)
        handle = os.open(name, os.O_RDONLY | _NO_LINKS)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(held)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path`; when the block ends well it takes that name, else it goes.

    Raises BadInput where something has the name by then. What others that were killed left is
    removed, as by `replacing`.
    """
    import shutil

    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    held, name = _part(path, _make_folder)
    try:
        yield Path(name)
        os.chmod(name, 0o755)
        if path.is_symlink() or path.exists():
            raise BadInput(
                f"{_printable(path)} is there already; remove it, or choose another --out"
            )
        os.rename(name, path)
    finally:
        shutil.rmtree(name, ignore_errors=True)
        os.close(held)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the parts that writers which were killed left in a folder; those being written stay.

    Args:
        folder: of ours.
        name: of the file they were to become; all where None.
    """
    for entry in os.scandir(folder):
        part = _PART.fullmatch(entry.name)
        if part is None or (name is not None and part[1] != name[:_MOST_NAME]):
            continue
        with suppress(OSError):  # a writer holds it, another swept it, it is not ours to remove
            handle = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | _NO_LINKS)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if entry.is_dir(follow_symlinks=False):
                    import shutil

                    shutil.rmtree(entry.path, ignore_errors=True)
                elif entry.is_file(follow_symlinks=False):
                    os.unlink(entry.path)
            finally:
                os.close(handle)


def _part(path: Path, make: Callable[..., tuple[int, str]]) -> tuple[int, str]:
    """Make what will become `path`; return its name, and a descriptor that holds it against
    `sweep` until it is closed."""
    while True:
        handle, name = make(dir=path.parent, prefix=f".{path.name[:_MOST_NAME]}.", suffix=".part")
        with suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return handle, name
        os.close(handle)  # swept before it was held


def _make_folder(**options: Any) -> tuple[int, str]:
    import tempfile

    name = tempfile.mkdtemp(**options)
    return os.open(name, os.O_RDONLY | _NO_LINKS), name


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8 with "\\n" at line ends."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    with replacing(path) as part:
        part.write_bytes(data)


def lock(path: str | os.PathLike[str]) -> int:
    """Return an open descriptor of a lock file, made where there is none. Raises GreenvisError
    where that is a link."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o644)
    except OSError as error:
        if os.path.islink(path):
            raise GreenvisError(
                f"the lock {_printable(path)} is a link; remove it, then try again"
            ) from error
        raise


def own_folder(folder: Path, below: Path) -> Path:
    """Make `folder` and what lies between it and `below`, and return it.

    Raises GreenvisError where one of them is a link: what greenvis writes would land in a folder
    that is not its own. `below` itself is the user's choice, and may be one.
    """
    below.mkdir(parents=True, exist_ok=True)
    current = below
    for part in folder.relative_to(below).parts:
        current /= part
        if current.is_symlink():
            raise GreenvisError(
                f"{_printable(current)} is a link, which is not written through; remove it, then "
                "try again"
            )
        current.mkdir(exist_ok=True)
    return folder


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _printable(path: str | os.PathLike[str]) -> str:
    """Return a path as it may be printed: without control characters, cut to a line."""
    text = "".join(c if c.isprintable() else "�" for c in str(path))
    return text if len(text) <= 300 else text[:297] + "…"
