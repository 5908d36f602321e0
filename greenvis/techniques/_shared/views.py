"""Other looks at an image, drawn image by image from torch's random state."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from greenvis.core.technique import InputShape, Technique
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE

_ASPECT = 4 / 3  # a crop's sides are to each other at most as this, stretched back to the image's
_CUT = 0.5  # of a side, the longest side of what a strong view leaves out


class RandomViews(Technique):
    """A technique that looks at random views of each image: crop, flip, contrast, brightness."""

    tasks = IMAGES
    instead = IMAGES_ALONE

    area: float = Field(
        default=0.25, gt=0, le=1, description="smallest share of the image that a view shows"
    )
    colour: float = Field(
        default=0.4, ge=0, le=1, description="how far contrast and brightness change"
    )
    flip: bool = Field(default=True, description="turn views left to right half the time")
    input_shape: InputShape = None


def random_view(
    images: Tensor,
    area: float | tuple[float, float],
    colour: float,
    flip: bool = True,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return another look at each image, drawn from torch's random state, in one resampling.

    Args:
        images: (batch, channels, height, width).
        area: least share of the image that a crop shows, or least and greatest; its sides are
            stretched by up to 4 : 3, and it is brought to `size`.
        colour: greatest change of contrast (a factor about the image's mean) and of brightness (a
            shift in units of its standard deviation).
        flip: whether half of the images are turned left to right.
        size: (height, width) of the views in pixels; None: the images'.

    Returns:
        The views, of the images' dtype.
    """
    maps = random_maps(len(images), area, flip, images.device)
    return recoloured(through(images, maps, size), colour).to(images.dtype)


def random_maps(
    count: int, area: float | tuple[float, float], flip: bool, device: torch.device
) -> Tensor:
    """Return what parts of images views show, drawn from torch's random state.

    Args:
        count: of images.
        area, flip: of `random_view`.
        device: of the maps.

    Returns:
        (count, 2, 3): from a view's coordinates to the image's, both -1 to 1 from edge to edge, x
        first; no rotation.
    """

    def drawn(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device) * (high - low) + low

    share = drawn(*(area if isinstance(area, tuple) else (area, 1.0)))
    # both sides within the image
    stretch = (drawn(-1.0, 1.0) * share.log().neg().clamp(max=math.log(_ASPECT))).exp().sqrt()
    height, width = share.sqrt() / stretch, share.sqrt() * stretch
    down, across = (drawn(-1.0, 1.0) * (1 - size) for size in (height, width))
    turned = (
        torch.where(drawn(0.0, 1.0) < 0.5, -1.0, 1.0) if flip else torch.ones(count, device=device)
    )
    zero = torch.zeros(count, device=device)
    return torch.stack(
        [torch.stack([width * turned, zero, across], 1), torch.stack([zero, height, down], 1)], 1
    )


def through(images: Tensor, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return what images show through maps, float32 (batch, channels, height, width).

    Args:
        images: (batch, channels, height, width).
        maps: of `random_maps`, (batch, 2, 3).
        size: (height, width) of the views in pixels; None: the images'.
    """
    shape = [*images.shape[:2], *(size or images.shape[2:])]
    grid = F.affine_grid(maps, shape, align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def recoloured(views: Tensor, colour: float) -> Tensor:
    """Return views in another contrast and brightness, drawn from torch's random state; `colour` as
    of `random_view`."""
    mean, deviation = views.mean((1, 2, 3), keepdim=True), views.std((1, 2, 3), keepdim=True)
    contrast, brightness = (
        (torch.rand(len(views), device=views.device) * (2 * colour) - colour).view(-1, 1, 1, 1)
        for _ in range(2)
    )
    return (views - mean) * (1 + contrast) + mean + brightness * deviation


def random_views(
    images: Tensor,
    count: int,
    area: float | tuple[float, float],
    colour: float,
    flip: bool = True,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return several `random_view`s of each image in one batch, view by view.

    Args:
        images: (batch, channels, height, width).
        count: Views of each.
        area, colour, flip, size: Of `random_view`.

    Returns:
        (count · batch, channels, height, width).
    """
    return torch.cat([random_view(images, area, colour, flip, size) for _ in range(count)])


def strong_view(images: Tensor, area: float, colour: float) -> Tensor:
    """Return a look at each image that is hard to recognise: `random_view`, and a square of it grey
    (Cutout: DeVries and Taylor, 2017), whose side is up to half the image's.

    Args:
        images: (batch, channels, height, width).
        area: Least share of the image that is shown.
        colour: Greatest change of contrast and of brightness.

    Returns:
        The views, of the images' shape and dtype.
    """
    out = random_view(images, area, colour)
    count, _, height, width = out.shape
    half = torch.rand(count, 1, device=out.device) * _CUT / 2
    middle = torch.rand(2, count, 1, device=out.device)
    inside = [
        ((torch.arange(side, device=out.device) + 0.5) / side - at).abs() <= half
        for side, at in zip((height, width), middle, strict=True)
    ]
    cut = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(cut, out.mean((1, 2, 3), keepdim=True), out)
