"""Collages: items put on synthetic textures, with the mask and the boxes that belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.data.transforms import bounding_boxes

BLOCK = 256  # images drawn together, each block from a seed of its own: fewer are the first of more
TILT = math.pi / 8  # radians an item is turned, at most
LEAST_VISIBLE = 0.25  # of an item; what is covered further has no box


@dataclass(frozen=True)
class Items:
    """What collages are made of.

    Args:
        pixels: float (n, 3, height, width), 0 to 1, multiplied by alpha.
        alpha: float (n, 1, height, width): 1 where the item is, 0 beside it.
        labels: int64 (n,), from 1: 0 is the background.
        tinted: Whether each showing gets a colour of its own.
    """

    pixels: Tensor
    alpha: Tensor
    labels: Tensor
    tinted: bool = False


@dataclass(frozen=True)
class Collages:
    """Collages with what they show.

    Args:
        images: uint8 (n, 3, side, side).
        masks: uint8 (n, side, side): the class of each pixel, 0 is the background.
        boxes: For each image {"boxes": BoundingBoxes (k, 4), xyxy in pixels, "labels": int64 (k,)}
            of what can be seen of each item.
    """

    images: Tensor
    masks: Tensor
    boxes: list[dict[str, Any]]


Ground = Callable[[int, torch.Generator], Tensor]


def noise(side: int, rng: torch.Generator) -> Tensor:
    """Return grey noise, float (BLOCK, 3, side, side), 0 to 1: no image's differs from another's by
    more than chance."""
    return torch.rand(BLOCK, 1, side, side, generator=rng).expand(-1, 3, -1, -1)


def textures(side: int, rng: torch.Generator) -> Tensor:
    """Return textures, float (BLOCK, 3, side, side): two colours mixed by noise and stripes."""
    axis = torch.linspace(0, 1, side)
    angle, waves, share = torch.rand(3, BLOCK, 1, 1, generator=rng)
    angle = math.pi * angle
    lines = axis.view(1, -1, 1) * angle.sin() + axis.view(1, 1, -1) * angle.cos()
    blend = share * torch.sin(lines * 2 * math.pi * (2 + 8 * waves))
    for cells in (3, 8, 20):
        coarse = torch.randn(BLOCK, 1, cells, cells, generator=rng)
        fine = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        blend = blend + 2 / cells**0.5 * fine[:, 0]
    first, second = torch.rand(2, BLOCK, 3, 1, 1, generator=rng)
    return torch.lerp(first, second, blend.sigmoid().unsqueeze(1))


def draw(
    items: Items,
    count: int,
    side: int,
    *,
    seed: int,
    most: int,
    sizes: tuple[float, float],
    ground: Ground = textures,
) -> Collages:
    """Draw collages; later items lie over earlier ones.

    Args:
        items: What to show; each equally often.
        count: Images.
        side: Of an image, in pixels.
        seed: The first images of a seed are the same, however many are drawn.
        most: Items in an image; one at least.
        sizes: Side of an item as a share of the image's, from and to.
        ground: What draws the backgrounds, of a side and a random state: (BLOCK, 3, side, side).

    Returns:
        The collages.
    """
    blocks = []
    for number, start in enumerate(range(0, count, BLOCK)):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
        canvas = ground(side, rng)
        blocks.append(_block(items, min(BLOCK, count - start), canvas, most, sizes, rng))
    return Collages(
        torch.cat([block.images for block in blocks]),
        torch.cat([block.masks for block in blocks]),
        [box for block in blocks for box in block.boxes],
    )


def _block(
    items: Items,
    count: int,
    canvas: Tensor,
    most: int,
    sizes: tuple[float, float],
    rng: torch.Generator,
) -> Collages:
    side = canvas.shape[-1]
    masks = torch.zeros(BLOCK, side, side, dtype=torch.uint8)
    owner = torch.full((BLOCK, side, side), -1, dtype=torch.int8)
    numbers = torch.randint(1, most + 1, (BLOCK,), generator=rng)
    labels, areas = [], []
    for layer in range(most):
        chosen = torch.randint(len(items.labels), (BLOCK,), generator=rng)
        grid = _placement(side, sizes, rng)
        tint = 0.35 + 0.65 * torch.rand(BLOCK, 3, 1, 1, generator=rng) if items.tinted else 1.0
        present = (layer < numbers).view(-1, 1, 1, 1)
        layers = torch.cat([items.pixels[chosen], items.alpha[chosen]], 1)
        placed = F.grid_sample(layers, grid, align_corners=False) * present
        pixels, alpha = placed[:, :3], placed[:, 3:]
        canvas = canvas * (1 - alpha) + pixels * tint
        inside = alpha[:, 0] > 0.5
        labels.append(items.labels[chosen])
        areas.append(inside.sum((1, 2)))
        masks = torch.where(inside, labels[-1].to(torch.uint8).view(-1, 1, 1), masks)
        owner = owner.masked_fill(inside, layer)
    images = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    kinds, full_areas = torch.stack(labels, 1), torch.stack(areas, 1)
    boxes = [_boxes(owner[row], kinds[row], full_areas[row]) for row in range(count)]
    return Collages(images[:count], masks[:count], boxes)


def _placement(side: int, sizes: tuple[float, float], rng: torch.Generator) -> Tensor:
    """Return the grid that shows an item at a random size, tilt, side and position inside the
    image, (BLOCK, side, side, 2)."""
    share, tilt, x, y, turn = torch.rand(5, BLOCK, generator=rng)
    share = sizes[0] + (sizes[1] - sizes[0]) * share
    tilt = (2 * tilt - 1) * TILT
    flip = torch.where(turn < 0.5, -1.0, 1.0)
    x, y = ((2 * v - 1) * (1 - share) for v in (x, y))
    cos, sin = tilt.cos() / share, tilt.sin() / share
    theta = torch.stack(
        [flip * cos, flip * sin, -flip * (cos * x + sin * y), -sin, cos, sin * x - cos * y], 1
    )
    return F.affine_grid(theta.view(-1, 2, 3), [BLOCK, 1, side, side], align_corners=False)


def _boxes(owner: Tensor, labels: Tensor, areas: Tensor) -> dict[str, Any]:
    """Return the boxes of the items that can be seen.

    Args:
        owner: int8 (side, side), the layer that each pixel shows; -1 is the background.
        labels: int64 (layers,).
        areas: int64 (layers,), pixels of each item before others were laid over it; 0 where the
            image has fewer.
    """
    boxes, shown = [], []
    for layer, area in enumerate(areas.tolist()):
        rows, columns = (owner == layer).nonzero(as_tuple=True)
        if len(rows) and len(rows) >= LEAST_VISIBLE * area:
            left, right = int(columns.min()), int(columns.max()) + 1
            boxes.append([left, int(rows.min()), right, int(rows.max()) + 1])
            shown.append(layer)
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": bounding_boxes(corners, tuple(owner.shape)), "labels": labels[shown]}
