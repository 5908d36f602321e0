"""Options of a model that a stranger's recipe may hold: those that could read a file, or fill the
memory, are refused before a library sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.core import weights
from greenvis.core.validation import format_value
from greenvis.errors import BadInput
from greenvis.models.libraries import PARTS

# words of an option's name by which a library reads a file, an address or a cache
READING = {
    "path", "paths", "file", "files", "filename", "checkpoint", "ckpt", "weights", "state", "cfg",
    "config", "url", "uri",
    "dir", "folder", "cache", "repo", "hub", "revision", "code", "source", "load", "resume",
}  # fmt: skip
MOST_PIXELS, MOST_SIZE = 16_384, 1_000_000


def refuse_files(ref: str, options: Mapping[str, Any]) -> None:
    """Refuse options by which a library reads a file or an address: it may unpickle what it finds,
    which runs code.

    By rule, not by list, because a model may take any option: the words of its name, and what its
    value looks like.
    """

    def reads(name: str, value: Any) -> bool:
        if isinstance(value, Mapping) and name in PARTS and ref.startswith("transformers/"):
            return any(reads(str(key), inner) for key, inner in value.items())
        if set(re.split(r"[^a-z]+", name.lower())) & READING:
            return True
        if isinstance(value, Mapping):
            return any(reads(str(key), inner) for key, inner in value.items())
        if isinstance(value, (list, tuple)):
            return any(reads("", inner) for inner in value)
        return isinstance(value, str) and (
            "/" in value or "\\" in value or Path(value).suffix.lower() in weights.SUFFIXES
        )

    for name, value in options.items():
        if reads(name, value):
            raise BadInput(
                f"{ref}: the option '{name}' can make the library read a file, whose content may "
                "run code; give weights by `pretrained` or `init`, which never do, or pass "
                "`--trust` (trust=True) if you trust it"
            )


def refuse_huge_sizes(ref: str, options: Mapping[str, Any]) -> None:
    """Refuse sizes that no machine holds, before a library tries."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            refuse_huge_sizes(ref, value)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            most = MOST_PIXELS if name in ("img_size", "image_size") else MOST_SIZE
            if isinstance(number, (int, float)) and not abs(number) <= most:  # NaN, too
                raise BadInput(
                    f"{ref}: the option '{name}' is {format_value(number)}; its limit is {most:,}"
                )
