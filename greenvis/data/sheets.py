"""Contact sheets: some images of a data set beside each other, with their labels drawn in."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from greenvis.data.splits import Split

TILE, CAPTION, COLUMNS = 112, 14, 8  # pixels, pixels, images in a row
MOST_LETTERS = 18  # of a caption


def sheet(split: Split, classes: Sequence[str], count: int = 48) -> Image.Image:
    """Draw a contact sheet.

    Args:
        split: Images and labels of any kind: masks lie over the images, boxes are outlined, others
            stand below.
        classes: Names, by label.
        count: Images, taken at even distances.

    Returns:
        The sheet, in colour.
    """
    rows = torch.linspace(0, len(split) - 1, min(count, len(split))).long().unique().tolist()
    height = -(-len(rows) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * TILE, height * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(page)
    colours = palette(len(classes))
    for number, row in enumerate(rows):
        x, y = number % COLUMNS * TILE, number // COLUMNS * (TILE + CAPTION)
        label = split.labels[row]
        page.paste(_tile(split.images[row], label, split.kind, colours), (x, y))
        text = _caption(label, split.kind, classes)
        text = f"{split.names[row]} · {text}" if split.names else text
        short = text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
        draw.text((x + 2, y + TILE + 1), short, fill="black")
    return page


def palette(count: int) -> Tensor:
    """Return colours that are far from each other, uint8 (count, 3); the first is black."""
    hues = [(0.618 * i) % 1 for i in range(count - 1)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.9, 1.0) for hue in hues)]
    return (torch.tensor(colours) * 255).round().to(torch.uint8)


def _tile(image: Tensor, label: Any, kind: str, colours: Tensor) -> Image.Image:
    """Return an image inside TILE pixels, with what lies on it."""
    pixels = image.expand(3, -1, -1)
    if kind == "mask":
        over = colours[label.long().clamp_min(0)].permute(2, 0, 1)
        mixed = (pixels.float() + over.float()) / 2
        pixels = torch.where(label > 0, mixed.to(torch.uint8), pixels)
    side = max(pixels.shape[-2:])
    zoom = TILE / side
    size = [max(1, round(n * zoom)) for n in pixels.shape[-2:]]
    scaled = F.resize(pixels, size, antialias=True)
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).numpy())), (0, 0))
    if kind == "box":
        draw = ImageDraw.Draw(tile)
        for box, number in zip(label["boxes"].tolist(), label["labels"].tolist(), strict=True):
            colour = tuple(colours[number].tolist())
            draw.rectangle([zoom * v for v in box], outline=colour, width=2)
    return tile


def _caption(label: Any, kind: str, classes: Sequence[str]) -> str:
    numbers: list[int]
    if kind == "class":
        return "?" if label < 0 else classes[int(label)]
    if kind == "number":
        return ", ".join(f"{value:.4g}" for value in label.tolist())
    if kind == "multilabel":
        numbers = torch.where(label > 0)[0].tolist()
        return ", ".join(classes[n] for n in numbers)
    numbers = (label["labels"] if kind == "box" else label).unique().tolist()
    return ", ".join(classes[n] for n in numbers if n > 0)
