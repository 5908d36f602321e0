"""Append lines to a run record. Standard library only."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.meters.record import SCHEMA

SYNC_EVERY_S = 5.0
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | os.O_CLOEXEC
KEEP_LINES = 10_000  # lines held in memory while the disk refuses them


class Writer:
    """Append lines to one record. A full or read-only disk never raises here: `problem` says what
    went wrong."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.problem = ""
        self._held: list[bytes] = []
        self._torn = False
        self._fd = -1
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._synced = time.monotonic()
        self.line("header", {"schema": SCHEMA, **header})

    @property
    def lost(self) -> bool:
        """Whether there are lines that the disk did not take."""
        return bool(self._held)

    def line(self, type: str, values: Mapping[str, Any]) -> None:
        """Write one line. Lines the disk refuses are held and tried again at the next call."""
        if os.getpid() != self._pid:  # a forked child: the record is its parent's
            return
        text = json.dumps(
            {"type": type, **_plain(values)}, separators=(",", ":"), ensure_ascii=False
        )
        with self._lock:
            self._held.append(text.encode("utf-8", "replace") + b"\n")
            self._flush()

    def close(self, status: str, reason: str = "") -> None:
        """Write the `end` line and close the file. A second call does nothing."""
        with self._lock:
            if self._pid < 0:
                return
            self.line(
                "end",
                {
                    "status": status,
                    "reason": reason,
                    "mono_s": time.monotonic(),
                    "clock_s": time.time(),
                },
            )
            if self._fd >= 0:
                self._sync(force=True)
                os.close(self._fd)
            self._fd, self._pid = -1, -1

    def _flush(self) -> None:
        try:
            if self._fd < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(
                    self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINKS, 0o644
                )
            while self._held:
                data = b"\n" + self._held[0] if self._torn else self._held[0]
                self._torn = os.write(self._fd, data) < len(data)
                if self._torn:
                    raise OSError("the disk took only part of a line")
                self._held.pop(0)
            self._sync()
        except OSError as error:
            self.problem = f"cannot write {self.path}: {error}"
            # totals are cumulative: the newest lines matter, and the header
            if len(self._held) > KEEP_LINES:
                del self._held[1 : len(self._held) - KEEP_LINES // 2]

    def _sync(self, force: bool = False) -> None:
        if force or time.monotonic() - self._synced > SYNC_EVERY_S:
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self.problem = f"cannot sync {self.path}: {error}"
            self._synced = time.monotonic()


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it; NaN and infinity become words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (str, int, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()):  # a numpy or torch scalar
        return _plain(value.item())
    return str(value)
