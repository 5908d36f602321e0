"""Layouts: what stands where in an image that is to be made, and crops of real images pasted so,
with the masks or boxes that belong to them (X-Paste: Zhao et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.ndimage import find_objects, label
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from greenvis.core import files
from greenvis.data.transforms import bounding_boxes
from greenvis.errors import BadInput, nearest

LEAST_SIDE = 4  # pixels of a crop
LEAST_VISIBLE = 0.25  # of a box; what is covered further is left out
SIZES = (0.25, 0.5)  # of a pasted crop, as shares of an image's side
MOST_ITEMS, MOST_IMAGES = 100, 100_000  # of a layout; of a file


@dataclass(frozen=True)
class Item:
    """A class and its box, x0, y0, x1, y1 in shares of the image's side."""

    label: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """An object cut out of a real image.

    Attributes:
        pixels: uint8 (C, h, w).
        alpha: Which of them are the object's, bool (h, w).
        label: Its class.
    """

    pixels: Tensor
    alpha: Tensor
    label: int


def rule(short: Mapping[int, int], generator: torch.Generator) -> list[list[Item]]:
    """Return layouts of one object each, of a random size at a random position.

    Args:
        short: How many of each class.
        generator: Of sizes and positions.
    """
    out = []
    for number, count in short.items():
        for size, x, y in torch.rand(count, 3, generator=generator).tolist():
            side = SIZES[0] + (SIZES[1] - SIZES[0]) * size
            left, top = x * (1 - side), y * (1 - side)
            out.append([Item(number, (left, top, left + side, top + side))])
    return out


def read(path: Path, classes: Sequence[str]) -> list[list[Item]]:
    """Return the layouts of a JSON file, as a person or a language model writes it: a list of
    images, each a list of {"class": name or number, "box": [x0, y0, x1, y1]} in shares of the side.

    Raises:
        BadInput: For a file that is none, an unknown class, or a box that is none.
    """
    content = files.read_json(path, "layout")
    if not isinstance(content, list) or not 0 < len(content) <= MOST_IMAGES:
        raise BadInput(f"{path}: a layout file is a list of images, each a list of objects")
    return [_items(path, i, entry, classes) for i, entry in enumerate(content)]


def _items(path: Path, number: int, entry: Any, classes: Sequence[str]) -> list[Item]:
    where = f"{path}: image {number + 1}"
    if not isinstance(entry, list) or not 0 < len(entry) <= MOST_ITEMS:
        raise BadInput(f"{where} is no list of 1 to {MOST_ITEMS} objects")
    out = []
    for item in entry:
        name = item.get("class") if isinstance(item, dict) else None
        index = classes.index(name) if name in classes else name
        if type(index) is not int or not 0 < index < len(classes):
            raise BadInput(f"{where}: no class {name!r} to paste{nearest(str(name), classes[1:])}")
        out.append(Item(index, _box(where, item.get("box"))))
    return out


def _box(where: str, box: Any) -> tuple[float, float, float, float]:
    """Return a box as it should be. Raises BadInput for any other."""
    if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
        x0, y0, x1, y1 = (float(v) for v in box)
        if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
            return x0, y0, x1, y1
    raise BadInput(f"{where}: {box!r} is no box [x0, y0, x1, y1] in shares, 0 to 1")


def cut(pixels: Tensor, target: Any) -> list[Crop]:
    """Return the objects of an image: each region of a class in its mask, or each of its boxes.

    Args:
        pixels: uint8 (C, H, W).
        target: A mask (H, W), whose 0 is the background, or {"boxes", "labels"}.
    """
    out = []
    if isinstance(target, Tensor):
        for number in target[target > 0].unique().tolist():
            labelled: Any = label((target == number).numpy())
            regions = labelled[0]
            for i, window in enumerate(find_objects(regions), 1):
                alpha = torch.from_numpy(regions[window] == i)
                out.append(Crop(pixels[:, window[0], window[1]], alpha, number))
    else:
        corners = target["boxes"].round().long().clamp_min(0).tolist()
        for (x0, y0, x1, y1), number in zip(corners, target["labels"].tolist(), strict=True):
            part = pixels[:, y0:y1, x0:x1]
            out.append(Crop(part, torch.ones(part.shape[1:], dtype=torch.bool), number))
    return [crop for crop in out if min(crop.alpha.shape) >= LEAST_SIDE]


def paste(pixels: Tensor, target: Any, pasted: Sequence[tuple[Crop, Item]]) -> tuple[Tensor, Any]:
    """Return an image and its labels with crops in their boxes, each as large as fits; later ones
    lie over earlier ones.

    Args:
        pixels: uint8 (C, H, W).
        target: As of `cut`.
        pasted: Crops with the items whose boxes they fill.
    """
    image, (height, width) = pixels.clone(), pixels.shape[1:]
    owner = torch.full((height, width), -1)
    areas = []
    for number, (crop, item) in enumerate(pasted):
        alpha, top, left = _inside(image, crop, item)
        part = owner[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        part[alpha] = number
        areas.append(int(alpha.sum()))
    if isinstance(target, Tensor):
        mask = target.clone()
        for number, (crop, _) in enumerate(pasted):
            mask[owner == number] = crop.label
        return image, mask
    boxes, labels = [], []
    for box, number in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        x0, y0, x1, y1 = (round(v) for v in box)
        under = owner[max(0, y0) : y1, max(0, x0) : x1]
        if under.numel() and float((under < 0).double().mean()) >= LEAST_VISIBLE:
            boxes.append(box)
            labels.append(number)
    for number, (crop, _) in enumerate(pasted):
        rows, columns = (owner == number).nonzero(as_tuple=True)
        if len(rows) and len(rows) >= LEAST_VISIBLE * areas[number]:
            corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            boxes.append([float(v) for v in corners])
            labels.append(crop.label)
    shown = bounding_boxes(torch.tensor(boxes).view(-1, 4), (height, width))
    return image, {"boxes": shown, "labels": torch.tensor(labels, dtype=torch.int64)}


def _inside(image: Tensor, crop: Crop, item: Item) -> tuple[Tensor, int, int]:
    """Paste a crop into the middle of its box, and return its alpha as it lies there, and its top
    left corner."""
    height, width = image.shape[1:]
    x0, y0, x1, y1 = item.box
    left, top = min(round(x0 * width), width - 1), min(round(y0 * height), height - 1)
    room = (max(1, round(y1 * height) - top), max(1, round(x1 * width) - left))
    zoom = min(room[0] / crop.alpha.shape[0], room[1] / crop.alpha.shape[1])
    size = [
        min(space, max(1, round(zoom * n))) for n, space in zip(crop.alpha.shape, room, strict=True)
    ]
    scaled = F.resize(crop.pixels, size, antialias=True)
    alpha = F.resize(crop.alpha[None].float(), size, antialias=True)[0] >= 0.5
    top, left = top + (room[0] - size[0]) // 2, left + (room[1] - size[1]) // 2
    part = image[:, top : top + size[0], left : left + size[1]]
    part[:, alpha] = scaled[:, alpha]
    return alpha, top, left
