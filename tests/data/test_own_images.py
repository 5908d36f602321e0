"""A real user's folder: all that is wrong with it is said at once, and what is left trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from greenvis import data
from greenvis.data import DataSpec, images
from greenvis.data.sets import folder as own
from greenvis.errors import BadInput

CLASSES = ("chien", "Katze", "δελφίνι")


def users_folder(path: Path) -> Path:
    """Sixty JPEGs of three classes, of which one is cut off, and all that gathers beside them."""
    rng = np.random.default_rng(0)
    for number in range(60):
        target = path / CLASSES[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (30 + number % 5, 40, 4), dtype=np.uint8)
        image = Image.fromarray(pixels[..., :3])
        image = {0: image.convert("L"), 1: Image.fromarray(pixels, "CMYK")}.get(number % 7, image)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        image.save(target / f"naïve {number}.jpg", exif=exif)
    rgba = Image.fromarray(pixels, "RGBA")
    rgba.save(path / "Katze" / "with alpha.png")
    rgba.convert("RGB").quantize(7).save(path / "Katze" / "palette.PNG")
    wide = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(wide).save(path / "chien" / "sixteen.png")
    whole = (path / "chien" / "naïve 0.jpg").read_bytes()
    (path / "chien" / "cut off.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "Katze" / "text.jpg").write_text("no image")
    (path / "Katze" / "notes.txt").write_text("no image")
    (path / "leer").mkdir()
    (path / "chien" / "._naïve 0.jpg").write_bytes(b"\0\5\x16\7")
    for hidden in (path / ".thumbs", path / "Katze" / ".ipynb_checkpoints", path / "__MACOSX"):
        hidden.mkdir()
        (hidden / "x.jpg").write_bytes(whole)
    (path / "loose.jpg").write_bytes(whole)
    return path


def test_one_look_says_all_that_is_wrong(tmp_path: Path) -> None:
    users_folder(tmp_path / "mine")
    with pytest.raises(BadInput) as caught:
        data.load(DataSpec(name="folder:mine", img_size=8), tmp_path)
    first, *problems, last = str(caught.value).splitlines()
    assert first == f"folder:{tmp_path / 'mine'} cannot be used as it is:"
    assert "skip_broken: true" in last
    texts = sorted(problem.partition(": ")[0] for problem in problems)
    assert texts == [
        "- cannot read the image Katze/text.jpg",
        "- cannot read the image chien/cut off.jpg",
        f"- no images in {tmp_path / 'mine' / 'leer'}; looked for '.bmp', '.gif', '.jpeg', '.jpg', "
        "'.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp'",
    ]
    notes = own.look(tmp_path / "mine").notes
    assert notes == [
        "1 no images, passed over: 'Katze/notes.txt'",
        "1 in no class, passed over: 'loose.jpg'",
    ]


def test_what_is_broken_is_left_out_and_recorded(tmp_path: Path) -> None:
    users_folder(tmp_path / "mine")
    spec = DataSpec(name="folder:mine", img_size=8, skip_broken=True)
    mine = data.load(spec, tmp_path)
    assert mine.classes == tuple(sorted(CLASSES))
    assert len(mine.train) + len(mine.test) == 63
    assert len(mine.facts()["skipped"]) == 3
    again = data.load(spec.model_copy(update={"img_size": 12}), tmp_path)
    assert again.checksum == mine.checksum  # of what is shown
    (tmp_path / "mine" / "leer").rmdir()
    for name in ("Katze/text.jpg", "chien/cut off.jpg"):
        (tmp_path / "mine" / name).unlink()
    mended = data.load(DataSpec(name="folder:mine", img_size=8), tmp_path)
    assert mended.checksum == mine.checksum
    assert "skipped" not in mended.facts()


def test_grey_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    users_folder(tmp_path / "mine")
    shown = images.decode(images.read(tmp_path / "mine" / "chien" / "sixteen.png"), "image")
    assert (int(shown.min()), int(shown.max())) == (0, 255)
    assert len(shown.unique()) == 64


def test_a_class_of_broken_files_alone_is_no_class(tmp_path: Path) -> None:
    users_folder(tmp_path / "mine")
    (tmp_path / "mine" / "bad").mkdir()
    (tmp_path / "mine" / "bad" / "x.jpg").write_text("no image")
    survey = own.look(tmp_path / "mine")
    assert f"no image in {tmp_path / 'mine' / 'bad'} can be read" in survey.problems
    mine = data.load(DataSpec(name="folder:mine", img_size=8, skip_broken=True), tmp_path)
    assert mine.classes == tuple(sorted(CLASSES))


def test_nothing_to_show_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "x.jpg").write_text("no image")
    with pytest.raises(BadInput, match="has 0 classes with images that can be read"):
        data.load(DataSpec(name="folder:mine", skip_broken=True), tmp_path)


def test_a_scan_of_many_is_kept_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MANY", 5)
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    paths = images.below(users_folder(tmp_path / "mine"))
    broken = images.scan(paths)
    assert {path.name for path in broken} == {"text.jpg", "cut off.jpg"}
    decoded: list[Any] = []
    decode = images.decode

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        decoded.append(args)
        return decode(*args, **options)

    monkeypatch.setattr(images, "decode", counted)
    assert images.scan(paths) == broken
    assert not decoded
    Image.new("RGB", (9, 9)).save(tmp_path / "mine" / "Katze" / "text.jpg")
    assert {path.name for path in images.scan(paths)} == {"cut off.jpg"}
    assert len(decoded) == len(paths)
