"""Emoji: the same concepts drawn by several artists, from the npm packages `emoji-datasource-*`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greenvis.core import files
from greenvis.data import images
from greenvis.data.dataset import DataSet
from greenvis.data.splits import Split, Stored, divide_by_share, sha256
from greenvis.errors import BadInput, nearest

STYLES = {"google": "Apache-2.0", "twitter": "CC-BY-4.0"}
SIDE = 64
LEAST_IMAGES = 5  # of a subgroup that is a class


class Emoji(DataSet):
    """64x64 emoji in colour, on white; classes are Unicode's subgroups ("food-fruit") of five
    images or more, a fifth of each as the test. Those drawn alike are one image.
    """

    name = "emoji"
    argument = "STYLE"
    source = "https://www.npmjs.com/package/emoji-datasource"
    licence = "; ".join(f"{licence} ({style})" for style, licence in STYLES.items())
    options = frozenset({"root"})

    def check(self) -> None:
        """Raise BadInput for an unknown style, and where the package is not here."""
        self._package()

    def read(self) -> Stored:
        """Return all emoji of the style."""
        package = self._package()
        entries = _entries(package / "emoji.json", self.value)
        folder = package / "img" / self.value / str(SIDE)
        drawn: dict[bytes, tuple[Tensor, str]] = {}
        for file, group in entries:
            image = _read(folder / file)
            drawn.setdefault(image.numpy().tobytes(), (image, group))
        counts = Counter(group for _, group in drawn.values())
        classes = tuple(sorted(group for group, n in counts.items() if n >= LEAST_IMAGES))
        if len(classes) < 2:
            raise BadInput(f"{package} has fewer than two subgroups of {LEAST_IMAGES} emoji")
        chosen = [(image, group) for image, group in drawn.values() if group in classes]
        pixels = torch.stack([image for image, _ in chosen])
        labels = torch.tensor([classes.index(group) for _, group in chosen])
        train, test = divide_by_share(Split(pixels, labels))
        digest = sha256([pixels.numpy().tobytes(), labels.numpy().tobytes()])
        return Stored(train, test, classes, digest, SIDE, 3)

    def _package(self) -> Path:
        """Return the folder of the style's package."""
        if self.value not in STYLES:
            raise BadInput(f"unknown data set 'emoji:{self.value}'{nearest(self.value, STYLES)}")
        name, root = f"emoji-datasource-{self.value}", self.root or self.folder.resolve()
        for folder in (root / name, root / "node_modules" / name):
            if (folder / "emoji.json").is_file():
                return folder
        raise BadInput(
            f"emoji: no {name} in {root} or its node_modules; get it there with `npm install "
            f"{name}`, or name the folder that holds it with `root`"
        )


def _entries(path: Path, style: str) -> list[tuple[str, str]]:
    """Return the file name and the subgroup of each emoji that the style has."""
    entries: Any = files.read_json(path, "list of emoji")
    out = []
    try:
        for entry in sorted(entries, key=lambda entry: entry["unified"]):
            if entry[f"has_img_{style}"]:
                image, group = entry["image"], entry["subcategory"]
                if Path(image).name != image or not isinstance(group, str):
                    raise ValueError(f"an image is named {image!r}")
                out.append((image, group))
    except (TypeError, KeyError, ValueError) as error:
        raise BadInput(
            f"{path} is no list of emoji ({type(error).__name__}: {error}); get the package anew"
        ) from error
    return out


def _read(path: Path) -> Tensor:
    image = images.decode(images.read(path), f"image {path}", background="white")
    if image.shape != (3, SIDE, SIDE):
        raise BadInput(f"{path} is not {SIDE}x{SIDE}; get the package anew")
    return image
