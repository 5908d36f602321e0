"""Other answers than one class per image, from any backbone: one per pixel, one per bag of
images, boxes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.weights import first_line
from greenvis.errors import BadInput
from greenvis.models.bag_head import Bags
from greenvis.models.maps import StageMaps
from greenvis.models.structure import View, view


def with_head(model: nn.Module, head: str, classes: int, size: Any = None) -> nn.Module:
    """Give a classifier of images another answer.

    Args:
        model: A backbone with its classifier.
        head: "dense": a class per pixel. "boxes": boxes with classes. "mean", "max", "attention",
            "gated", "transmil": a class per bag of images, by what is pooled over the bag
            (`models.bag_head`).
        classes: How many; of boxes with the background, which is 0.
        size: The images' side, or (height, width), in pixels, where the model does not say.

    Returns:
        The model; the backbone is in it, without its classifier.

    Raises:
        BadInput: For a backbone whose features or classifier are not found.
    """
    structure = looked_at(model, head, size)
    if head == "dense":
        return Dense(model, structure, classes)
    if head == "boxes":
        from greenvis.models.detector import detector

        return detector(model, structure, classes)
    return Bags(model, structure, head, classes)


def looked_at(model: nn.Module, head: str, size: Any = None) -> View:
    """Return a backbone's parts, by its structure.

    Args:
        model: The backbone.
        head: What it is looked at for, for the message.
        size: The images' side, or (height, width), in pixels, where the model does not say.

    Raises:
        BadInput: For a backbone that does not run.
    """
    example: Any = None
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        example = (3 if conv is None else conv.in_channels * conv.groups, *sides)
    mode = model.training
    try:
        return view(model.eval(), example, probe=False)
    except RuntimeError as error:
        raise BadInput(f"`head: {head}` looks at the model's parts: {first_line(error)}") from error
    finally:
        model.train(mode)


class Dense(StageMaps):
    """A class for each pixel: the last features of each stage of a backbone, each brought to
    classes by a 1×1 convolution and to the images' size bilinearly, added up (Long et al., 2015).

    Args:
        backbone: A classifier; what stands behind its last stage leaves it.
        structure: `structure.view` of it.
        classes: How many.
    """

    def __init__(self, backbone: nn.Module, structure: View, classes: int) -> None:
        super().__init__(backbone, structure, "dense")
        self.projections = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, m.shape[1]), nn.Conv2d(m.shape[1], classes, 1)).to(m)
            for m in self.probed
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes, height, width) of images (batch, channels, height,
        width)."""
        parts = [
            F.interpolate(project(m), x.shape[2:], mode="bilinear", align_corners=False)
            for project, m in zip(self.projections, self.maps(x), strict=True)
        ]
        return torch.stack(parts).sum(0)
