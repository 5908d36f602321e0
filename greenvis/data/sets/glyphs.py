"""Letters in the fonts of the machine, drawn by Pillow: a data set that nobody has to fetch."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cache
from pathlib import Path
from string import ascii_letters, ascii_lowercase
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from greenvis.data.splits import Split, Stored

SIDE, FONT_SIZE, BASELINE = 32, 22, 23  # pixels
ZOOM = 4  # drawn so much larger, and averaged
LEAST_DISTINCT = 40  # of 52 letters; I and l may be alike
ACCENTS = "éñü"  # a font that has them is one of text; symbols and formulas put signs on letters
LEAST_FAMILIES = 3
KINDS = ("serif", "sans", "mono", "hand")
LEAST_OF_KIND = 2
TEST_EVERY = 4  # families: of so many, one is the test


class Glyphs(DataSet):
    """Letters, large and small, in white on black: 32x32, in every family of fonts that this
    machine or matplotlib has.

    The test is of whole families that no training shows: about a quarter of them, chosen by their
    names alone. What two families draw alike is shown once, in training. The kinds of fonts are
    domains, by what each font says of itself: `domains: {train: [sans], test: [sans, serif]}`.
    """

    name = "glyphs"
    source = "drawn by greenvis in the fonts of the machine"
    licence = "that of each font"
    classes = tuple(ascii_lowercase)
    kind = ""  # of fonts that are shown: one of `KINDS`; "" for all

    def domain(self, name: str) -> DataSet | None:
        """Return the letters in fonts of one kind."""
        if name not in KINDS:
            return None
        own = Glyphs(self.spec, self.folder)
        own.kind = name
        return own

    def check(self) -> None:
        """Raise BadInput where the machine has too few fonts."""
        least = LEAST_OF_KIND if self.kind else LEAST_FAMILIES
        if len(families := self._families()) < least:
            kind = f" of kind '{self.kind}'" if self.kind else ""
            raise BadInput(
                f"glyphs: {len(families)} families of fonts with Latin letters{kind} are here, and "
                f"{least} are needed; install some (`apt-get install fonts-dejavu "
                "fonts-liberation`)"
            )

    def read(self) -> Stored:
        """Return every letter of every font."""
        from greenvis.data.splits import Stored, sha256

        self.check()
        families = self._families()
        ordered = sorted(families, key=lambda name: hashlib.sha256(name.encode()).digest())
        tests = set(ordered[::TEST_EVERY])
        drawn: dict[bytes, tuple[str, int]] = {}
        for part in ("train", "test"):
            for family in ordered:
                if (family in tests) == (part == "test"):
                    for path in families[family]:
                        for pixels, label in _letters(path):
                            drawn.setdefault(pixels, (part, label))
        splits = [
            _split([(pixels, label) for pixels, (own, label) in drawn.items() if own == part])
            for part in ("train", "test")
        ]
        digest = sha256(
            part.encode() + bytes([label]) + pixels for pixels, (part, label) in drawn.items()
        )
        return Stored(splits[0], splits[1], self.classes, digest, SIDE, 1)

    def _families(self) -> dict[str, list[Path]]:
        every = _families()
        if not self.kind:
            return every
        return {name: paths for name, paths in every.items() if _kind(paths[0]) == self.kind}


def _split(letters: list[tuple[bytes, int]]) -> Split:
    import numpy as np
    import torch

    from greenvis.data.splits import Split

    pixels = np.frombuffer(b"".join(image for image, _ in letters), np.uint8)
    images = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE).copy())
    return Split(images, torch.tensor([label for _, label in letters]))


@cache
def _families() -> dict[str, list[Path]]:
    """Return the files of the fonts that have all letters, by family; each font once."""
    import matplotlib
    from matplotlib import font_manager

    bundled = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [Path(path) for path in font_manager.findSystemFonts()] + list(bundled.glob("*.ttf"))
    families: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(paths, key=lambda path: (path.name, str(path))):
        if (names := _names(path)) is not None:
            families[names[0]].setdefault(names[1], path)
    return {family: list(styles.values()) for family, styles in sorted(families.items())}


def _names(path: Path) -> tuple[str, str] | None:
    """Return the family and the style of a font of text; None where it is another, or broken."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(path))
        has = font.get_charmap()
    except (OSError, RuntimeError, ValueError):
        return None
    if any(ord(letter) not in has for letter in ascii_letters + ACCENTS):
        return None
    return font.family_name, font.style_name


@cache
def _kind(path: Path) -> str:
    """Return which of `KINDS` a font says that it is (PANOSE 1.0; one width for all letters);
    "" where it says nothing."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    if (font.get_sfnt_table("post") or {}).get("isFixedPitch"):
        return "mono"
    family, style, *_ = (font.get_sfnt_table("OS/2") or {}).get("panose") or b"\0\0"
    if family == 3:
        return "hand"
    return "" if family != 2 or style < 2 else "serif" if style <= 10 else "sans"


def _letters(path: Path) -> list[tuple[bytes, int]]:
    """Return the pixels of each letter and its label; none of a font that draws them alike."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(path), ZOOM * FONT_SIZE)
    out = []
    for letter in ascii_letters:
        large = Image.new("L", (ZOOM * SIDE, ZOOM * SIDE))
        position = (ZOOM * SIDE / 2, ZOOM * BASELINE)
        ImageDraw.Draw(large).text(position, letter, fill=255, font=font, anchor="ms")
        image = large.resize((SIDE, SIDE), Image.Resampling.BOX)
        out.append((image.tobytes(), ascii_lowercase.index(letter.lower())))
    return out if len({pixels for pixels, _ in out}) >= LEAST_DISTINCT else []
