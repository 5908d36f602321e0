"""The folder of caches on disk: which there are, which are in use, made and taken away by one
process at a time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greenvis.core import files

LITTER = re.compile(r"\.new-[a-z0-9_]{8}|\.old-[0-9a-f]{32}-\d+")  # caches half made, half removed


def caches(folder: Path) -> Iterator[Path]:
    """Yield the folder of each cache there is, finished ones only."""
    if folder.is_dir():
        yield from (
            p for p in folder.iterdir() if not p.name.startswith(".") and (p / "key.json").is_file()
        )


def size_of(path: Path) -> int:
    """Return a file's bytes, -1 where it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def last_used(path: Path) -> float:
    """Return when a file was last written, in seconds since the epoch; 0 where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_idle(path: Path) -> bool:
    """Whether no process has this cache open."""
    try:
        use = os.open(path / "in-use", os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(use)


def remove(path: Path) -> None:
    """Take a cache away: first its name, at once, then its files."""
    gone = path.with_name(f".old-{path.name}-{os.getpid()}")
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return
    if gone.is_symlink():
        gone.unlink()
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time creates or removes caches in it, and what those
    that were killed left half made or half removed goes."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.lock(folder / ".lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.iterdir():
            if LITTER.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def reserve(handle: int, size: int) -> None:
    """Make a file of zeros, its blocks taken now where the system can: a full disk under a mapped
    file kills the process."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)
