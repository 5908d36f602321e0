"""Where data sets that are fetched lie, and what is said when fetching fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
