"""What a finished model draws, or the segments that it answers, for its record: figures alone do
not show a collapse."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis import data
from greenvis.data.image_set import ImageSet
from greenvis.tasks.answers import UNKNOWN
from greenvis.tasks.base import Task
from greenvis.tasks.segmentation import PICTURES, Segmentation

COUNT, SIDE, MOST = 10, 32, 12  # images a setting, their longest side, settings
SEGMENTED, SEGMENTED_SIDE, JUDGED = 8, 48, 64  # images with segments, that show what matches


def drawn(
    points: Callable[[], Mapping[str, AbstractContextManager[Any]]],
    answer: Callable[[Any, Any], Any],
    task: Task,
    images: ImageSet,
    classes: int,
) -> list[dict[str, Any]]:
    """Return images drawn at each setting, from the same random state: [{"setting", "shape",
    "pixels"}], bytes compressed by zlib, as base64.

    Args:
        points: Gives contexts by name, new ones at each call; {} of a model without settings.
        answer: Images and labels to the outputs of the task.
        task: That draws, or that answers with segments: then images of the test, their masks and
            the answers are shown, in the colours of their classes.
        images: The test, whose range images are shown in.
        classes: Of which one image each is drawn, up to ten in all.
    """
    if isinstance(task, Segmentation):
        return _segmented(answer, task, images, classes)
    if task.form != "generation":
        return []
    labels = torch.arange(COUNT) % max(classes, 1)
    like = torch.zeros(COUNT, *images.shape)
    out = []
    for name in [*points()][:MOST] or [""]:
        point = points()[name] if name else nullcontext()
        with torch.random.fork_rng(), point, torch.inference_mode():
            torch.manual_seed(0)
            shown = answer(like, labels).images.cpu().clone()
        out.append(_entry(name, stored(shown, images)))
    return out


def _segmented(
    answer: Callable[[Any, Any], Any], task: Segmentation, images: ImageSet, classes: int
) -> list[dict[str, Any]]:
    x, y = next(iter(data.batches(images, JUDGED)))
    with torch.inference_mode():
        answers = task.segments(answer(x, y).float().cpu(), y)
    shown = [stored(x[:SEGMENTED], images, SEGMENTED_SIDE)]
    size = shown[0].shape[2:]
    for labels in (y, answers):
        coloured = _colours(max(classes, int(labels.max()) + 1))[labels[:SEGMENTED]]
        shown.append(F.interpolate(coloured.movedim(-1, 1).float(), size).to(torch.uint8))
    return [_entry(name, pixels) for name, pixels in zip(PICTURES, shown, strict=True)]


def _colours(classes: int) -> Tensor:
    """Return the colour of each class, uint8 (classes + 1, 3): black the background, grey what is
    not known, which is the last."""
    assert UNKNOWN == -1
    hues = torch.arange(classes - 1)[:, None] / max(classes - 1, 1) + torch.tensor([0, 1, 2]) / 3
    own = 140 + 115 * (2 * torch.pi * hues).cos()
    ends = torch.zeros(1, 3), torch.full((1, 3), 128.0)
    return torch.cat([ends[0], own, ends[1]]).round().to(torch.uint8)


def _entry(name: str, pixels: Tensor) -> dict[str, Any]:
    text = base64.b64encode(zlib.compress(pixels.numpy().tobytes(), 9)).decode()
    return {"setting": name, "shape": [*pixels.shape], "pixels": text}


def stored(x: Tensor, images: ImageSet, side: int = SIDE) -> Tensor:
    """Return normalised images as bytes, no larger than is shown: uint8 (n, channels, height,
    width)."""
    form = images.transform
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (form.mean, form.std))
    x = (x * std + mean).clamp(0, 1)
    if max(x.shape[-2:]) > side:
        x = F.interpolate(x, scale_factor=side / max(x.shape[-2:]), mode="area")
    return (x * 255).round().to(torch.uint8)
