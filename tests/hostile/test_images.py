"""Images of strangers: each ends with exit 2 and its name, in little memory, or is shown as it is;
nothing hangs."""

from __future__ import annotations

import gzip
import io
import os
import re
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from greenvis import data
from greenvis.data import images as decoding
from greenvis.data.sets.fashion_mnist import FashionMnist
from greenvis.data.splits import sha256
from greenvis.errors import BadInput
from tests.hostile.bounds import bounded, everything, greenvis

SIZE = 200 * 2**20  # bytes that a bomb unpacks to
SECONDS = 10  # of CPU; what is read before the odd one counts, too


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int = 8, height: int = 8, more: bytes = b"", pixels: bytes | None = None) -> bytes:
    """Return a grey PNG of zeros, with chunks before its pixels; pixels: what is packed instead."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    packed = zlib.compress(bytes(height * (width + 1)) if pixels is None else pixels)
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def saved(form: str, side: int = 8) -> bytes:
    """Return a good image."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side), np.uint8)).save(
        buffer, form
    )
    return buffer.getvalue()


BYTES: dict[str, Callable[[], bytes]] = {
    "60,000 by 60,000": lambda: png(60_000, 60_000, pixels=bytes(1000)),
    "12,000 by 12,000": lambda: png(12_000, 12_000),
    "9,000 by 9,000": lambda: png(9_000, 9_000, pixels=bytes(1000)),
    "a line of 2 ** 31 - 1": lambda: png(2**31 - 1, 1, pixels=b""),
    "no pixels": lambda: png(0, 0),
    "a GIF of 65,535 by 65,535": lambda: b"GIF89a" + 4 * b"\xff" + b"\0\0\0,\0\0\0\0" + 4
    * b"\xff" + b"\0\x02\x02L\x01\0;",
    "a BMP of 2 ** 30 pixels": lambda: saved("BMP")[:18] + struct.pack("<ii", 2**15,
    2**15) + saved("BMP")[26:],
    "zTXt": lambda: png(more=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(SIZE)))),
    "iTXt": lambda: png(more=chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(SIZE)))),
    "many of zTXt": lambda: png(more=chunk(b"zTXt",
    b"Comment\0\0" + zlib.compress(bytes(900 * 1024))) * 200),
    "iCCP": lambda: png(more=chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(SIZE)))),
    "half a PNG": lambda: saved("PNG", 64)[:2000],
    "half a JPEG": lambda: saved("JPEG", 64)[:700],
    "half a TIFF": lambda: saved("TIFF", 64)[:200],
    "half a WebP": lambda: saved("WEBP", 64)[:100],
    "half a GIF": lambda: saved("GIF", 64)[:900],
    "nothing": lambda: b"",
    "a word": lambda: b"hello",
    "a pickle": lambda: b"\x80\x04cos\nsystem\n(S'id'\ntR.",
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 "
                          b"8\n%%EndComments\nshowpage\n",
    "a wrong checksum": lambda: saved("PNG")[:30] + b"\xff" + saved("PNG")[31:],
}  # fmt: skip


def folder(path: Path) -> Path:
    """Return a data set of two classes of five good images."""
    for label in ("a", "b"):
        (path / label).mkdir(parents=True)
        for i in range(5):
            (path / label / f"{i}.png").write_bytes(png())
    return path


@pytest.mark.parametrize("name", BYTES)
def test_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    bad = folder(tmp_path / "set") / "a" / "odd.png"
    bad.write_bytes(BYTES[name]())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = everything(tmp_path)
    for verb in ("plan", "run"):
        said = greenvis(verb, "recipe.yaml", cwd=tmp_path, seconds=SECONDS)
        assert said.code == 2, said
        lines = said.err[said.err.index("greenvis: ") :].strip().splitlines()
        assert sum("cannot read" in line for line in lines) == 1
        assert re.search(r"^  - cannot read the image a/odd\.png: ...", lines[1])
    assert everything(tmp_path) == before


RECIPE = """\
name: odd
data: {name: "folder:set", img_size: 8, in_chans: 1}
model: {ref: plain/mlp, img_size: 8, hidden: [4]}
meter: {codecarbon: false}
arms: {full: {}}
"""


def test_good_images_are_taken(tmp_path: Path) -> None:
    folder(tmp_path / "set")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    said = greenvis("run", "recipe.yaml", cwd=tmp_path, seconds=60, growth=2**30)
    assert said.code == 0, said


def make_socket(path: Path) -> None:
    """Make a socket there."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    unix.close()


def make_large(path: Path) -> None:
    """Make a sparse file of 2 GB there."""
    with path.open("wb") as file:
        file.truncate(2 * 2**30)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a socket": make_socket,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "2 GB": make_large,
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_refused_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    folder(tmp_path / "set")
    NO_FILES[name](Path("set/a/odd.png"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    said = greenvis("run", "recipe.yaml", cwd=tmp_path, seconds=SECONDS)
    assert said.code == 2, said
    assert re.search(r"cannot read the image .*odd\.png", said.err)


@pytest.mark.parametrize(
    "name", [b"set/a/\xff.png", b"set/a/caf\xe9.PNG", b"set/a/b\xe9/0.png", b"set/\xe9/0.png"]
)
def test_a_name_that_is_not_utf_8_is_refused(
    name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "set")
    os.makedirs(os.path.dirname(name), exist_ok=True)
    with open(name, "wb") as file:
        file.write(png())
    with pytest.raises(BadInput, match="is not UTF-8: rename it") as error:
        data.load(data.DataSpec(name="folder:set"))
    assert "�" in str(error.value)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert greenvis("plan", "recipe.yaml", cwd=tmp_path).code == 2


def test_what_is_in_excess_of_the_pixels_is_not_unpacked(tmp_path: Path) -> None:
    folder(tmp_path / "set")
    (tmp_path / "set" / "a" / "0.png").write_bytes(png(pixels=bytes(SIZE)))
    assert len(data.load(data.DataSpec(name=f"folder:{tmp_path / 'set'}", img_size=8)).train) == 8


def test_the_checksum_is_that_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * 2**20 + 1))
    assert sha256([tmp_path / "file", b"a"]) == sha256([bytes(3 * 2**20 + 1), b"a"])


@pytest.mark.parametrize(
    "kind",
    ["a bomb", "bad gzip", "half", "negative sizes", "labels beyond", "fewer labels", "a pipe"],
)
def test_idx_files(kind: str, tmp_path: Path) -> None:
    def idx(*sizes: int, content: bytes | None = None) -> bytes:
        count = int(np.prod(sizes))
        return struct.pack(f">{1 + len(sizes)}i", 0x0800 + len(sizes), *sizes) + (
            bytes(count) if content is None else content
        )

    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(20, 28, 28))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(20))
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    fashion = FashionMnist(data.DataSpec(name="fashion-mnist", root=str(tmp_path)))
    assert len(fashion.read().train.labels) == 20
    if kind == "labels beyond":
        labels.write_bytes(idx(20, content=b"\xff" * 20))
    elif kind == "fewer labels":
        labels.write_bytes(idx(19))
    elif kind == "negative sizes":
        images.write_bytes(idx(20, -28, -28, content=bytes(20 * 28 * 28)))
    elif kind == "half":
        images.write_bytes(idx(20, 28, 28)[:5000])
    elif kind == "a pipe":
        labels.unlink()
        os.mkfifo(labels)
    else:
        packed = gzip.compress(idx(20, 28, 28) + bytes(SIZE))
        images.with_name(f"{images.name}.gz").write_bytes(
            packed if kind == "a bomb" else packed[:40] + b"\xff" * 40
        )
    with bounded(2), pytest.raises(BadInput):
        fashion.read()


def test_rows_of_hugging_face_data_are_held_to_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for i, content in enumerate(
        (BYTES["9,000 by 9,000"](), BYTES["PostScript"](), BYTES["nothing"]())
    ):
        rows = {
            "image": [{"bytes": content, "path": None}, {"bytes": png(), "path": None}] * 3,
            "label": [0, 1] * 3,
        }
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / str(i)))
        with pytest.raises(BadInput, match=r"cannot read the image of row \d"):
            data.load(data.DataSpec(name=f"hf-datasets:{tmp_path / str(i)}", img_size=8))


def test_a_good_image_is_what_it_was(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    for form in ("PNG", "BMP", "TIFF", "PPM", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
        assert torch.equal(
            decoding.decode(buffer.getvalue(), "image"), torch.from_numpy(pixels).permute(2, 0, 1)
        ), form
