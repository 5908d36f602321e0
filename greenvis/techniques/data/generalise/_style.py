"""Where a model's features have a style, and what that is: mean and deviation of each channel over
the positions of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.tasks.answers import IMAGES
from greenvis.techniques._shared.attach import first, patches_matter, precise, with_first

EPS = 1e-6
_PARTS = 4  # that a row of blocks of one width is divided into
TASKS = IMAGES | {"bags"}
INSTEAD = "it changes the features of images in one network of theirs: leave it out"
Where = tuple[Annotated[int, Field(ge=0)], ...]

# of features with the axes of their positions, the same features in another style
Change = Callable[[Tensor, tuple[int, ...]], Tensor]


def style(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and deviation by image and channel, of length 1 along `axes`.

    Args:
        x: Features, the batch first.
        axes: Of the positions, two or more of these in all.

    Returns:
        The mean, and the root of the unbiased variance + 1e-6.
    """
    return x.mean(axes, keepdim=True), (x.var(axes, keepdim=True) + EPS).sqrt()


@dataclass(frozen=True)
class Site:
    """An output of a model that has positions.

    Args:
        path: Of the module.
        channels: Their axis, 1 or -1.
        prefix: Tokens that are no patches.
        behind: Whether those stand behind the patches.
    """

    path: str
    channels: int
    prefix: int = 0
    behind: bool = False

    def apply(self, change: Change, output: Any) -> Any:
        """Return a module's output with its positions changed, and all else as it was."""
        x = first(output)
        if not self.prefix:
            return with_first(output, _changed(change, x, self.channels))
        count = x.shape[1] - self.prefix
        sizes = [count, self.prefix] if self.behind else [self.prefix, count]
        parts = list(x.split(sizes, 1))
        patches = 0 if self.behind else 1
        parts[patches] = _changed(change, parts[patches], self.channels)
        return with_first(output, torch.cat(parts, 1))


def _changed(change: Change, x: Tensor, channels: int) -> Tensor:
    """Return features in another style; as they are where they have no style: of one position."""
    axes = tuple(range(2, x.dim()) if channels == 1 else range(1, x.dim() - 1))
    if sum(x.shape[axis] - 1 for axis in axes) < 1:
        return x
    return change(x.to(precise(x)), axes).to(x.dtype)


def sites(model: nn.Module, structure: View) -> dict[int, Site]:
    """Return where a model's features have positions, by number: 0 behind the first layer (its
    patches, its first convolution), 1, 2, … behind each stage.

    Blocks of one width throughout are four stages. Without blocks each convolution is one.
    """
    out: dict[int, Site] = {}
    stem = structure.patch_embed or next(iter(structure.convs), None)
    if stem is not None and stem not in structure.functional:
        conv = isinstance(model.get_submodule(stem), nn.modules.conv._ConvNd)
        out[0] = Site(stem, 1 if conv else -1)
    runs = structure.stages
    if len(runs) == 1:
        blocks, count = runs[0], min(_PARTS, len(runs[0]))
        runs = tuple((blocks[(i + 1) * len(blocks) // count - 1],) for i in range(count))
    ends = [site for run in runs if (site := _of_block(structure, run[-1])) is not None]
    if not structure.blocks:
        plain = [p for p in structure.convs if p != stem and not structure.in_classifier(p)]
        ends = [Site(path, 1) for path in plain if path not in structure.functional]
    if ends and ends[-1].prefix and not patches_matter(model, structure, ends[-1].path):
        ends = ends[:-1]
    return {**out, **dict(enumerate(ends, 1))}


def _of_block(structure: View, path: str) -> Site | None:
    layout = structure.layouts.get(path)
    if layout is None or len(layout.output) not in (3, 4):
        return None
    if layout.output[0] != len(structure.example):  # windows, or positions first
        return None
    if len(layout.output) == 4:
        return Site(path, layout.channels)
    return Site(path, -1, structure.prefix_tokens, structure.prefix_position == "behind")


def attach(
    model: nn.Module,
    structure: View,
    where: Sequence[int] | None,
    name: str,
    change: Change,
    stages: int | None = None,
) -> list[str]:
    """Have a change act on features, in train mode alone.

    Args:
        model: The model.
        structure: Its view.
        where: Numbers of `sites`; None: as many as `stages` says.
        name: Of the technique, for messages.
        change: What is done to features.
        stages: How many, not counting the first layer unless it is all there is; None: all, and
            that.

    Returns:
        The paths it acts behind.

    Raises:
        BadInput: Where the model shows no features with positions, or has no such site.
    """
    available = sites(model, structure)
    what = type(model).__name__
    if not available:
        raise BadInput(f"{name} changes maps or patches of features, and {what} shows none")
    chosen = list(available) if where is None else list(where)
    if where is None and stages is not None:
        chosen = [number for number in available if number][:stages] or chosen
    if missing := [number for number in chosen if number not in available]:
        raise BadInput(
            f"{name}: {what} has no stage {missing[0]} whose positions count; it has "
            f"{', '.join(map(str, available))} (0 is its first layer): choose of these in `where`"
        )
    for number in chosen:
        module = model.get_submodule(available[number].path)
        module.register_forward_hook(partial(_restyle, available[number], change))
    return [available[number].path for number in chosen]


def _restyle(site: Site, change: Change, module: nn.Module, args: Any, output: Any) -> Any:
    return site.apply(change, output) if module.training else None
