"""Run records beside their report: in one compressed file, so that anybody can price the evidence
anew."""

from __future__ import annotations

import lzma
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from greenvis.core import files
from greenvis.errors import BadInput
from greenvis.meters import record
from greenvis.report.groups import record_files

NAME = "records.jsonl.xz"
MOST = 300_000  # bytes of an archive: it is committed with its report
MOST_RAW = 32 * 2**20  # bytes of records; more would take long to pack, and not fit
MOST_READ = 40 * 2**20  # bytes an archive may unpack to
MOST_RECORDS = 100_000
_LONG = re.compile(
    rb"(?<=[:,\[])-?\d{1,10}\.\d{7,}(?=[,}\]])"
)  # a number of more than six decimals
BETWEEN = b'{"type":"record"}\n'  # before each record


class Packed(NamedTuple):
    """Records as one archive: its bytes, and whether digits of them were left out."""

    content: bytes
    rounded: bool


def pack(paths: Iterable[str | os.PathLike[str]]) -> Packed | None:
    """Return the records among `paths` as one archive, each once, in an order that does not depend
    on where they lie.

    Where the whole is larger than `MOST`, running totals that later ones replace are left out, and
    then what of totals and logs lies below a millionth (µs, µJ); None where that is not enough.
    """
    by_key: dict[tuple[str, str], bytes] = {}
    size = 0
    for path, _ in record_files(paths):
        size += path.stat().st_size
        if size > MOST_RAW:
            return None
        raw = path.read_bytes()
        key = _key(raw)
        if key and len(raw) > len(by_key.get(key, b"")):
            by_key[key] = raw
    records = [by_key[key] for key in sorted(by_key)]
    for shorter in (None, _thin, _round) if records else ():
        records = records if shorter is None else [shorter(raw) for raw in records]
        packed = lzma.compress(
            b"".join(BETWEEN + raw.rstrip(b"\n") + b"\n" for raw in records), preset=6
        )
        if len(packed) <= MOST:
            return Packed(packed, rounded=shorter is _round)
    return None


@contextmanager
def unpacked(paths: Iterable[str | os.PathLike[str]]) -> Iterator[list[str | os.PathLike[str]]]:
    """Hold `paths` with each archive, or folder that holds one and no record, replaced by a folder
    of its records."""
    with ExitStack() as held:
        out: list[str | os.PathLike[str]] = []
        for path in paths:
            packed = inside(path)
            out.append(
                path
                if packed is None
                else _unpack(packed, Path(held.enter_context(tempfile.TemporaryDirectory())))
            )
        yield out


@contextmanager
def opened(packed: Packed) -> Iterator[Path]:
    """Hold a folder of the records of an archive."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / NAME
        file.write_bytes(packed.content)
        yield _unpack(file, Path(folder))


def inside(path: str | os.PathLike[str]) -> Path | None:
    """Return the archive that a path is, or that its folder holds where no record lies there; None
    for other paths."""
    candidate = Path(path)
    if candidate.name.endswith(record.SUFFIX + ".xz"):
        return candidate
    packed = candidate / NAME
    return (
        packed if packed.is_file() and next(iter(record.find([candidate])), None) is None else None
    )


def _unpack(packed: Path, folder: Path) -> Path:
    raw = files.read(packed, "archive of run records")
    unpacker = lzma.LZMADecompressor()
    try:
        content = unpacker.decompress(raw, MOST_READ)
    except lzma.LZMAError as error:
        raise BadInput(f"{packed} is not an archive of run records: {error}") from error
    if not unpacker.eof:
        why = (
            "it is cut off"
            if unpacker.needs_input
            else f"it unpacks to more than {MOST_READ:,} bytes"
        )
        raise BadInput(f"{packed} cannot be read: {why}")
    if content.count(BETWEEN) > MOST_RECORDS:
        raise BadInput(f"{packed} cannot be read: it holds more than {MOST_RECORDS:,} records")
    for i, one in enumerate((b"\n" + content).split(b"\n" + BETWEEN)[1:]):
        (folder / f"{packed.parent.name}-{i:05d}{record.SUFFIX}").write_bytes(one)
    return folder


def _key(raw: bytes) -> tuple[str, str] | None:
    """Return a record's run and rank; None where no line of it is a header."""
    for text in raw.split(b"\n"):
        line = record.parse_line(text)
        if isinstance(line, dict) and line.get("type") == "header":
            return str(line.get("run")), str(line.get("rank"))
    return None


def _thin(raw: bytes) -> bytes:
    """Leave out samples that a later one of their phase replaces before anything else is
    written."""
    out: list[bytes] = []
    last: dict[str, bytes] = {}
    for text in raw.split(b"\n"):
        line = record.parse_line(text) if text.startswith(b'{"type":"sample"') else None
        if isinstance(line, dict) and isinstance(line.get("phase"), str):
            last[line["phase"]] = text
        elif text:
            out += [*last.values(), text]
            last = {}
    return b"\n".join([*out, *last.values()])


def _round(raw: bytes) -> bytes:
    """Leave out digits below a millionth in samples and logs; facts, which hold what one image
    took, stay as they are."""
    return b"\n".join(
        _LONG.sub(lambda number: b"%.6f" % float(number[0]), text)
        if text.startswith((b'{"type":"sample"', b'{"type":"log"'))
        else text
        for text in raw.split(b"\n")
    )
