"""What emoji there are and where their pictures lie: concepts of Unicode, and a picture of each in
a style. Imports no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.data import downloads
from greenvis.errors import BadInput, nearest, one_line

# licences of the styles: of PNG files of 64 pixels, and of SVG, drawn at any size
PNG_STYLES = {"google": "Apache-2.0", "twitter": "CC-BY-4.0"}
SVG_STYLES = {
    "emojione": "CC-BY-4.0",
    "fluent-emoji-flat": "MIT",
    "fxemoji": "Apache-2.0",
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "openmoji": "CC-BY-SA-4.0",
    "twemoji": "CC-BY-4.0",
}
STYLES = {**PNG_STYLES, **SVG_STYLES}
TABLES = tuple(f"emoji-datasource-{style}" for style in PNG_STYLES)  # either has the concepts
DICTIONARY = "@iconify-json/twemoji"  # names of pictures by code point, for styles without
CACHE = downloads.DOWNLOADS / "emoji"
MOST_BYTES = 64 * 2**20  # of a list of pictures
VARIATION = "fe0f"  # a code point that says "in colour", and is left out as often as not


@dataclass(frozen=True)
class Concept:
    """An emoji of Unicode: "1f34e" is a "red apple" in "food-fruit" of "Food & Drink"."""

    code: str
    name: str
    group: str
    subgroup: str


@dataclass(frozen=True)
class Drawing:
    """A concept's picture in one style: a PNG file, or SVG."""

    concept: Concept
    source: Path | str

    def png(self, side: int) -> bytes:
        """Return the picture as PNG; SVG is drawn `side` pixels wide."""
        if isinstance(self.source, Path):
            from greenvis.data import images

            return images.read(self.source)
        import resvg_py

        svg = self.source.replace("<svg ", f'<svg width="{side}" height="{side}" ', 1)
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))


def packages(style: str) -> list[str]:
    """Return the npm packages that a style needs."""
    if style in PNG_STYLES:
        return [f"emoji-datasource-{style}"]
    return [TABLES[0], *dict.fromkeys([DICTIONARY, f"@iconify-json/{style}"])]


def install(style: str, folder: Path) -> None:
    """Fetch a style's packages by npm, which runs none of their scripts.

    Args:
        style: Of `STYLES`.
        folder: Where its `node_modules` lie.

    Raises:
        BadInput: For an unknown style, where npm is not here, and where it fails.
    """
    if style not in STYLES:
        raise BadInput(f"unknown data set 'emoji:{style}'{nearest(style, STYLES)}")
    names = packages(style)
    by_hand = (
        f"unpack {' and '.join(names)} of https://www.npmjs.com into a folder that `root` names"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise BadInput(
            f"emoji:{style} is fetched by npm, which is not here: install it, or {by_hand}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ["--no-save", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
    command = [npm, "install", *quiet, "--prefix", str(folder), *names]
    with downloads.fetching(f"emoji:{style}", by_hand):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(one_line(done.stderr.strip()[-400:]))


class Library:
    """The packages of a style.

    Args:
        style: Of `STYLES`.
        roots: Folders that may hold the packages, or their `node_modules`.

    Raises:
        BadInput: For an unknown style, and where a package or what draws SVG is not here.
    """

    def __init__(self, style: str, roots: Sequence[Path]) -> None:
        if style not in STYLES:
            raise BadInput(f"unknown data set 'emoji:{style}'{nearest(style, STYLES)}")
        self.style, self.roots = style, roots
        if style in PNG_STYLES:
            self.table = self.package = self._folder(*packages(style))
            return
        self.table = self._folder(*TABLES)
        self.dictionary = self._folder(DICTIONARY)
        self.package = self._folder(f"@iconify-json/{style}")
        try:
            import resvg_py  # noqa: F401
        except ImportError as error:
            raise BadInput(
                f"emoji:{style} is drawn by resvg-py; get it with `pip install "
                "'greenvis[datasets]'`"
            ) from error

    def _folder(self, *names: str) -> Path:
        """Return the folder of the first package that is here."""
        for root in self.roots:
            for name in names:
                for folder in (root / name, root / "node_modules" / name):
                    if any((folder / file).is_file() for file in ("emoji.json", "icons.json")):
                        return folder
        raise BadInput(
            f"emoji: no {names[0]} in {' or '.join(map(str, self.roots))} or node_modules there; "
            f"get it with `greenvis data fetch emoji:{self.style}` (it calls `npm install "
            f"{' '.join(packages(self.style))}`), or name the folder that holds it with `root`"
        )

    def drawings(self) -> list[Drawing]:
        """Return the pictures, by code point. Raises BadInput for lists that are none."""
        png = self.style in PNG_STYLES
        entries = self._read(self.table / "emoji.json")
        with self._reading(self.table / "emoji.json"):
            concepts = {
                _bare(entry["unified"]): (_concept(entry), entry)
                for entry in entries
                if not png or entry[f"has_img_{self.style}"]
            }
            codes = sorted(concepts)
            if png:
                folder = self.package / "img" / self.style / "64"
                return [Drawing(concepts[c][0], folder / _plain(concepts[c][1])) for c in codes]
        icons = self._read(self.package / "icons.json")
        with self._reading(self.package / "icons.json"):
            names = self._names({code: entry for code, (_, entry) in concepts.items()})
            pictures = {names[n]: n for n in sorted(icons["icons"]) if n in names}
            return [
                Drawing(concepts[code][0], _svg(icons, icons["icons"][pictures[code]]))
                for code in codes
                if code in pictures
            ]

    def _names(self, entries: Mapping[str, Any]) -> Mapping[str, str]:
        """Return the code point of each name that a picture may have."""
        chars = self.package / "chars.json"
        own = self._read(chars) if chars.is_file() else {}
        if own:
            return {name: _bare(c) for c, name in own.items() if _bare(c) in entries}
        # without a list of its own, a style is read by the words of its names
        words: dict[str, str] = {}
        for code, name in self._read(self.dictionary / "chars.json").items():
            words.setdefault(_letters(name), _bare(code))
        for code, entry in entries.items():
            for name in (entry["name"], *entry["short_names"], _unicode_name(code)):
                words.setdefault(_letters(name), code)
        icons = self._read(self.package / "icons.json")["icons"]
        return {n: words[_letters(n)] for n in icons if words.get(_letters(n)) in entries}

    def _read(self, path: Path) -> Any:
        return files.read_json(path, "list of emoji", MOST_BYTES)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise BadInput(
                f"{path} is no list of emoji ({type(error).__name__}: {error}); get the package "
                "anew"
            ) from error


def _concept(entry: Any) -> Concept:
    values = entry["unified"], entry["name"], entry["category"], entry["subcategory"]
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"an entry says {values}")
    code, name, group, subgroup = values
    return Concept(_bare(code), name.lower(), group, subgroup)


def _plain(entry: Any) -> str:
    """Return the name of an entry's file."""
    if Path(entry["image"]).name != entry["image"]:
        raise ValueError(f"an image is named {entry['image']!r}")
    return entry["image"]


def _svg(icons: Any, icon: Any) -> str:
    def length(key: str, default: float) -> float:
        return float(icon.get(key, icons.get(key, default)))

    left, top = length("left", 0), length("top", 0)
    box = f"{left} {top} {length('width', 16)} {length('height', 16)}"
    if not isinstance(icon["body"], str):
        raise ValueError("a picture is no text")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


def _bare(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != VARIATION)


def _letters(name: str | None) -> str:
    return re.sub("[^a-z0-9]", "", (name or "").lower())


def _unicode_name(code: str) -> str:
    points = code.split("-")
    return unicodedata.name(chr(int(points[0], 16)), "") if len(points) == 1 else ""
