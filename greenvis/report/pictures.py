"""Images that a model drew, as a record holds them."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.report.arm_results import Picture

MOST_BYTES, MOST_SETTINGS = 65_536, 16


def pictures(entries: Iterable[Mapping[str, Any]]) -> list[Picture]:
    """Return the images of each setting that can be read; what is mistyped or too large is left
    out."""
    out = []
    for entry in [*entries][:MOST_SETTINGS]:
        shape, text = entry.get("shape"), entry.get("pixels")
        if (
            isinstance(shape, list)
            and len(shape) == 4
            and all(type(n) is int and 0 < n <= MOST_BYTES for n in shape)
            and math.prod(shape) <= MOST_BYTES
            and isinstance(text, str)
            and len(text) <= 2 * MOST_BYTES
        ):
            n, channels, height, width = shape
            picture = Picture(
                setting=str(entry.get("setting")), shape=(n, channels, height, width), pixels=text
            )
            if pixels(picture):
                out.append(picture)
    return out


def pixels(picture: Picture) -> bytes:
    """Return the bytes of a picture; none where they are not those of its shape."""
    size = math.prod(picture.shape)
    if not 0 < size <= MOST_BYTES:
        return b""
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(picture.pixels), size + 1)
    except (ValueError, zlib.error):
        return b""
    return raw if len(raw) == size else b""
