"""Image files of strangers, decoded within limits: known formats, bounded size, any depth of
pixel."""

from __future__ import annotations

import hashlib
import io
import json
import math
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from greenvis.core import files
from greenvis.data.downloads import DOWNLOADS
from greenvis.data.splits import Lazy
from greenvis.errors import BadInput, one_line, some

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# of no other a decoder is asked: some start programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_BYTES = 256 * 2**20  # bytes of an image's file
ORIENTATION = 0x0112  # a tag of EXIF: from 5 on, an image lies on its side
MOST_PIXELS = 2**26  # of an image: 200 MB once decoded in colour
HIDDEN = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # beside names that begin with a dot
MANY = 1000  # images: a scan of so many is worth keeping
CACHE = DOWNLOADS / "scans"


def lazy(paths: Sequence[Path]) -> Lazy:
    """Return the images of files, unread.

    Raises:
        BadInput: For a name that is not UTF-8, and for what is no regular file of bounded size.
    """
    check_names(paths)
    for path in paths:
        _check_regular(path)
    return Lazy(partial(_read_file, paths), range(len(paths)))


def check_names(paths: Iterable[Path]) -> None:
    """Raise BadInput for a name that is not UTF-8: no record could hold it."""
    for path in paths:
        if any("\ud800" <= c <= "\udfff" for c in str(path)):
            raise BadInput(f"the name of {one_line(path)} is not UTF-8: rename it, or take it out")


def below(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted; none that is hidden, or lies in a hidden
    folder: systems leave such (`._x.jpg`, `.ipynb_checkpoints`) beside one's own."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not is_hidden(path.relative_to(folder))
    )


def readable(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the image files below a folder that can be shown, sorted, and what keeps the others
    from it, a line each.

    Raises:
        BadInput: Where there is no such folder, or no such image in it.
    """
    if not folder.is_dir():
        raise BadInput(f"no folder at {folder}")
    every = below(folder)
    broken = scan(every)
    paths = [path for path in every if path not in broken]
    if not paths:
        raise BadInput(
            f"{folder} holds no image that can be read; looked for {some(sorted(SUFFIXES), 10)}"
        )
    return paths, [f"{path}: {why}" for path, why in broken.items()]


def is_hidden(path: Path) -> bool:
    """Return whether a name of a relative path is one that systems hide."""
    return any(part.startswith(".") or part in HIDDEN for part in path.parts)


def scan(paths: Sequence[Path]) -> dict[Path, str]:
    """Return what is wrong with each file that cannot be shown.

    Where there are many, what was seen is written to the user's cache, and read from there as long
    as no file has changed its name, size or time.
    """
    check_names(paths)
    cached = CACHE / f"{_fingerprint(paths)}.json" if len(paths) >= MANY else None
    if cached is not None and cached.is_file():
        seen = files.read_json(cached, "list of broken images")
        if isinstance(seen, dict):
            return {path: str(seen[str(path)]) for path in paths if str(path) in seen}
    broken: dict[Path, str] = {}
    for path in paths:
        try:
            _check_regular(path)
            decode(read(path), "image", draft=True)
        except BadInput as error:
            broken[path] = str(error).partition(": ")[2] or str(error)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        files.write(cached, json.dumps({str(path): why for path, why in broken.items()}).encode())
    return broken


def _fingerprint(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _check_regular(path: Path) -> None:
    """Raise BadInput for what has an image's name and is none: a folder, a pipe, a link to nothing,
    a file beyond all size."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f"cannot read the image {one_line(path)}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(
            f"cannot read the image {one_line(path)}: it is no regular file; take it out"
        )
    if status.st_size > MOST_BYTES:
        raise BadInput(
            f"cannot read the image {one_line(path)}: {status.st_size:,} bytes, and at most "
            f"{MOST_BYTES:,} are read"
        )


def _read_file(paths: Sequence[Path], row: int) -> Tensor:
    return decode(read(paths[row]), f"image {paths[row]}")


def read(path: str | Path) -> bytes:
    """Return an image file's bytes. Raises BadInput where it is none of bounded size."""
    return files.read(path, "image", MOST_BYTES)


def decode(data: bytes, what: str, background: str | None = None, draft: bool = False) -> Tensor:
    """Decode an image.

    Args:
        data: The file's bytes.
        what: What it is, for messages.
        background: The colour behind what is transparent; None shows what the file has there.
        draft: Whether a JPEG may come out smaller, which is quicker.

    Returns:
        uint8 (3, height, width).

    Raises:
        BadInput: Where the bytes are no image of bounded size.
    """
    with _opened(data, what) as image:
        if draft:
            image.draft(None, (1, 1))  # type: ignore[arg-type]
        return _to_tensor(image, background)


def decode_mask(data: bytes, what: str) -> Tensor:
    """Decode a mask: pixels are numbers of classes, or of a palette.

    Args:
        data: The file's bytes.
        what: What it is, for messages.

    Returns:
        uint8 (height, width), as the file has it, turned as its EXIF says.

    Raises:
        BadInput: Where the bytes are no image of bounded size and of one channel.
    """
    with _opened(data, what) as image:
        if image.mode == "1":
            image = image.convert("L")
        if image.mode not in ("L", "P"):
            raise ValueError(
                f"its pixels are of mode {image.mode}, and a mask has one number of a class for "
                "each: save it with one channel of 8 bits, or with a palette"
            )
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image)))


def size_of(data: bytes, what: str) -> tuple[int, int]:
    """Return (height, width) of an image, turned as its EXIF says, of which no pixel is decoded.

    Raises:
        BadInput: Where the bytes are no image of bounded size.
    """
    with _opened(data, what) as image:
        wide, high = image.size
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return (wide, high) if turned else (high, wide)


@contextmanager
def _opened(data: bytes, what: str) -> Iterator[Image.Image]:
    """Hold an image file open. Raises BadInput for whatever goes wrong with it meanwhile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if (pixels := math.prod(image.size)) > MOST_PIXELS:
                    raise ValueError(
                        f"it has {pixels:,} pixels, and at most {MOST_PIXELS:,} are decoded"
                    )
                yield image
    except MemoryError:
        raise
    except Exception as error:  # decoders of strangers' bytes stumble in many ways
        reason = (
            "no image of a known format"
            if isinstance(error, UnidentifiedImageError)
            else error or type(error).__name__
        )
        raise BadInput(f"cannot read the {what}: {reason}") from error


def _to_tensor(image: Image.Image, background: str | None = None) -> Tensor:
    """Return uint8 (3, height, width), upright. Raises ValueError where pixels are of no known
    range."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of those, 0 to 65,535
        raise ValueError(
            "its pixels are whole numbers of 32 bits, of no known range: save it with 8 or 16 bits"
        )
    upright = _eight_bits(ImageOps.exif_transpose(image))
    if background is not None:
        sheet = Image.new("RGBA", upright.size, background)
        upright = Image.alpha_composite(sheet, upright.convert("RGBA"))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey pixels of 16 bits, or of 0 to 1, in 8 bits: a plain conversion would cut off all
    above 255, or below 1."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    least, greatest = pixels.min().item(), pixels.max().item()
    most = 1.0 if image.mode == "F" else 65_535
    if not 0 <= least <= greatest <= most:
        raise ValueError(
            f"its pixels of mode {image.mode} are {least:g} to {greatest:g}, and 0 to {most:g} can "
            "be shown"
        )
    return Image.fromarray(np.rint(pixels * (255 / most)).astype(np.uint8))
