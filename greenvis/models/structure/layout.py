"""How the output of a part lies in memory: which axis holds the channels, and what of the rest is a
grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from greenvis.models.structure.trace import Trace


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
