"""Files of data sets that are fetched: where they lie, how packed ones are read, and what is said
when fetching fails."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greenvis.core import files
from greenvis.errors import BadInput

DOWNLOADS = Path("~/.cache/greenvis").expanduser()


@contextmanager
def fetching(name: str, otherwise: str) -> Iterator[None]:
    """Turn what stops a download into BadInput.

    Args:
        name: Of the data set.
        otherwise: What to do instead.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{name}: download failed ({error}); {otherwise}") from error


def read(path: Path, what: str, most: int) -> bytes:
    """Return a file's bytes, unpacked where its name ends in ".gz".

    Args:
        path: Of the file.
        what: What it is, for messages.
        most: The largest size to read, and to unpack to, in bytes; what is beyond is cut off.

    Raises:
        BadInput: Where it cannot be read.
    """
    try:
        raw = files.read(path, what, most)
        if path.suffix == ".gz":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot read {path}: {error}; get the file anew") from error
    return raw
