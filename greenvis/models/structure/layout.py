"""How the output of a part lies in memory: which axis holds the channels, and what of the rest is a
grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from greenvis.errors import GreenvisError
from greenvis.models.structure.calls import Trace


@dataclass(frozen=True)
class Layout:
    """A part's main input and output for one image. channels: the axis of the channels, 1 or -1.

    inputs: the shape of its first tensor argument. output: that of its output, or of the first
    tensor in a tuple.
    """

    inputs: tuple[int, ...]
    output: tuple[int, ...]
    channels: int

    @property
    def width(self) -> int:
        """How many channels the output has."""
        return self.output[self.channels]


def layouts(traced: Trace, paths: Iterable[str]) -> dict[str, Layout]:
    """Return the layout of each part that gives a tensor of two or more axes, with the same
    channels each time it runs."""
    by_path: dict[str, Layout] = {}
    for path in paths:
        runs = traced.runs.get(path, [])
        if not runs or any(len(shape) < 2 for run in runs for shape in run):
            continue
        axis = _channels(traced, path, *runs[0])
        if len({(len(output), output[axis]) for _, output in runs}) == 1:
            by_path[path] = Layout(*runs[0], axis)
    return by_path


def as_map(features: Tensor, channels: int, prefix: int = 0, aspect: float = 1.0) -> Tensor:
    """Return features of a layer as a map.

    Args:
        features: a map with its channels on axis `channels`, tokens (batch, prefix + patches,
            channels), or a vector.
        channels: their axis, 1 or -1.
        prefix: class and other tokens before the patches, which have no position in a grid.
        aspect: height / width of the image.

    Returns:
        (batch, channels, height, width).
    """
    if features.dim() == 4:
        return features if channels == 1 else features.permute(0, 3, 1, 2)
    if features.dim() == 2:
        return features[:, :, None, None]
    if features.dim() != 3:
        raise GreenvisError(
            f"features {tuple(features.shape)} are neither a map, nor tokens, nor a vector"
        )
    patches = features.shape[1] - prefix
    height = round(math.sqrt(patches * aspect))
    if height < 1 or patches % height:
        raise GreenvisError(
            f"{patches} tokens lie on no grid of an image with height : width = {aspect:.3g}; "
            "distil from a layer that has its patches whole, or answers only"
        )
    return features[:, prefix:].transpose(1, 2).unflatten(2, (height, patches // height))


def _channels(traced: Trace, path: str, inputs: tuple[int, ...], output: tuple[int, ...]) -> int:
    """A map has its channels first where a convolution in the part takes or gives that very map;
    else they are last.

    Of a part without weights to tell by (a norm, an activation) what takes or gives the same shape
    elsewhere tells.
    """
    if len(output) != 4:
        return -1
    within = path + "."
    inside = [c for c in traced.calls if c.path == path or c.path.startswith(within)]
    convs = [c for c in inside if c.kind == "conv"]
    if any(c.kind != "norm" for c in inside):
        return 1 if any(c.in_shape == inputs or c.out_shape == output for c in convs) else -1
    kinds = {c.kind for c in traced.calls if output in (c.in_shape, c.out_shape)}
    return 1 if "conv" in kinds and "linear" not in kinds else -1
