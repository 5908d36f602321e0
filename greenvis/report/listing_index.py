"""What `greenvis ls` shows of records, remembered between calls, so that many are listed without
parsing what was parsed before. Standard library only.

Entries are found by a digest of a record's bytes and of the code that read them, never by a name:
what changed is read anew, and nothing that comes with a folder of runs can speak for a record. The
file lies in the user's cache folder; without it, or where it cannot be used, records are parsed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

MOST_ENTRIES = 200_000  # the oldest leave first
WAIT_S = 0.5  # for another process that writes


def location() -> Path:
    """Return where the index lies."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "greenvis" / "listing.sqlite"


class Index:
    """Entries by the content they were made from; `with` writes new ones at its end."""

    def __init__(self, code: bytes) -> None:
        """Open the index.

        Args:
            code: names the code that makes entries (at most 64 bytes): other code, other entries.
        """
        self._code = code
        self._new: dict[bytes, str] = {}
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> Index:
        with suppress(OSError, RuntimeError, sqlite3.Error):  # no home folder is a RuntimeError
            self._db = _opened()
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is None:
            return
        with suppress(sqlite3.Error), closing(self._db) as db, db:
            db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", self._new.items())
            oldest = "(SELECT max(rowid) FROM entries) - ?"
            db.execute(f"DELETE FROM entries WHERE rowid <= {oldest}", (MOST_ENTRIES,))

    def __getitem__(self, content: bytes) -> Any:
        """Return the entry made from a content, or None."""
        if self._db is None:
            return None
        try:
            rows = self._db.execute(
                "SELECT entry FROM entries WHERE key = ?", (self._key(content),)
            )
            row = rows.fetchone()
            return json.loads(row[0]) if row else None
        except (ValueError, TypeError, RecursionError):  # no JSON
            return None
        except sqlite3.Error as error:
            self._db.close()
            self._db = None
            _remove_damaged(error)
            return None

    def __setitem__(self, content: bytes, entry: Any) -> None:
        self._new[self._key(content)] = json.dumps(entry)

    def _key(self, content: bytes) -> bytes:
        return blake2b(content, key=self._code, digest_size=16).digest()


def _opened() -> sqlite3.Connection:
    """Return the index, made anew where there is none or it is damaged.

    Raises OSError where it is a link, another user's, or others may write it.
    """
    file = location()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
    for path, is_kind in ((file.parent, stat.S_ISDIR), (file, stat.S_ISREG)):
        status = path.lstat()
        ours = status.st_uid == getattr(os, "getuid", lambda: 0)()
        if not ours or not is_kind(status.st_mode) or status.st_mode & stat.S_IWOTH:
            raise OSError(f"{path} is not ours alone")
    try:
        return _made(file)
    except sqlite3.Error as error:
        _remove_damaged(error)
        return _made(file)


def _remove_damaged(error: sqlite3.Error) -> None:
    """Remove the index, so that it is made anew, unless another process writes it."""
    if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        with suppress(OSError):
            location().unlink()


def _made(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(file, timeout=WAIT_S)
    db.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB UNIQUE, entry TEXT)")
    db.execute("SELECT key, entry FROM entries LIMIT 1")
    return db
