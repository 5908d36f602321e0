"""Predicting rotations: pretraining from the images alone, with four classes that cost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared.representation import Representation

_CHILD = "rotation"
QUARTERS = 4


def turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image counter-clockwise by its number of quarter turns.

    Args:
        images: (batch, channels, side, side).
        quarters: quarter turns per image, (batch,).

    Returns:
        The turned images, of the same shape.
    """
    out = torch.empty_like(images)
    for number in range(QUARTERS):
        chosen = quarters == number
        out[chosen] = images[chosen].rot90(number, (2, 3))
    return out


class Rotation(Technique):
    """Pretrain a model to tell by how many quarter turns an image was rotated (RotNet: Gidaris et
    al., 2018).

    Saves labels, not energy: a step costs what a supervised one does, four times that with `turns:
    all`, the paper's way. A
    pretext: labels are not used, and the classifier stays untrained. Adds the term "rotation", a
    cross entropy of four classes, from a linear layer beside the classifier that `merge` drops.
    Images must be square, and show things with an upside: where every turn looks alike there is
    nothing to learn.

    Example:
        >>> live = gv.wrap(model, gv.Rotation())
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "rotation"
    stage = "objective"
    tasks = IMAGES
    instead = IMAGES_ALONE
    needs = frozenset({"trainable_base"})
    examples = ({}, {"turns": "all"})

    turns: Literal["drawn", "all"] = Field(
        default="drawn",
        description="show each image in one turn, drawn for it, or in all four at once",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the layer that tells turns in. Raises BadInput for images that are not square, or no
        classifier."""
        structure = view(model, self.input_shape, probe=False)
        _check_square(structure.input_shape[1:])
        representation = Representation(model, structure)
        head = nn.Linear(representation.dim, QUARTERS)
        return InstalledRotation(self, representation.add(_CHILD, head), representation, head)


def _check_square(sides: tuple[int, ...]) -> None:
    if sides[0] != sides[1]:
        raise BadInput(
            f"a quarter turn of images of {sides} has another shape: rotation needs square ones"
        )


class InstalledRotation(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self,
        request: Rotation,
        names: tuple[str, ...],
        representation: Representation,
        head: nn.Linear,
    ) -> None:
        super().__init__(names)
        self.request, self.representation, self.head = request, representation, head

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"rotation"}: the cross entropy of the turn of each image x (batch, channels,
        side, side)."""
        _check_square(tuple(x.shape[2:]))
        if self.request.turns == "all":
            quarters = torch.arange(QUARTERS, device=x.device).repeat(len(x))
            x = x.repeat_interleave(QUARTERS, 0)
        else:
            quarters = torch.randint(QUARTERS, (len(x),), device=x.device)
        predicted = self.head(self.representation(turned(x, quarters)))
        return {"rotation": F.cross_entropy(predicted.float(), quarters)}
