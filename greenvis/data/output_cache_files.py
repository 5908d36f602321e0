"""The folder of caches on disk: which there are, which are in use, which make room; made and taken
away by one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput

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


def make_room(folder: Path, need: int, max_bytes: int, note: Callable[[str], None]) -> None:
    """Remove the caches used least recently until another fits; those in use stay.

    Args:
        folder: Where all caches lie; locked by the caller.
        need: Bytes of the new one.
        max_bytes: For all of them.
        note: Called with what was removed.

    Raises:
        BadInput: Where it cannot fit.
    """
    if need > max_bytes:
        raise BadInput(
            f"cache: these outputs take {need / 1e6:.1f} MB, more than max_bytes "
            f"({max_bytes / 1e6:.1f} MB); "
            "keep fp16 or top_k logits, fewer views, or raise the limit"
        )
    others = sorted(caches(folder), key=lambda p: last_used(p / "key.json"))
    total = sum(size_of(f) for p in others for f in p.iterdir())
    for path in others:
        if total + need <= max_bytes:
            return
        freed = sum(size_of(f) for f in path.iterdir())
        if is_idle(path):
            remove(path)
            total -= freed
            note(f"cache {path} made room ({freed / 1e6:.1f} MB): the least recently used")
    if total + need > max_bytes:
        raise BadInput(
            f"cache: {need / 1e6:.1f} MB more in {folder} would pass max_bytes "
            f"({max_bytes / 1e6:.1f} MB), "
            "and what is there is in use; raise the limit"
        )


def difference(folder: Path, header: Mapping[str, Any], about: Sequence[str]) -> str:
    """Say what differs from the most alike of the caches there are.

    Args:
        folder: Where all caches lie.
        header: Of the new one: its "key", and its form.
        about: Words of the key in which a cache compared with may not differ.

    Returns:
        What changed, by key; "" where there is none to compare with.
    """
    closest: dict[str, tuple[Any, Any]] | None = None
    for path in caches(folder):
        try:
            head = files.read_json(path / "key.json", "key")
            old, new = (
                {**h["key"], **{k: v for k, v in h.items() if k not in ("key", "shape")}}
                for h in (head, header)
            )
        except (BadInput, KeyError, TypeError, AttributeError):
            continue
        changed = {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}
        if not changed.keys() & set(about) and (closest is None or len(changed) < len(closest)):
            closest = changed
    return "; ".join(f"{k} changed: {a} → {b}" for k, (a, b) in sorted((closest or {}).items()))
