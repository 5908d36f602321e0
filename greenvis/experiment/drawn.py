"""Images that a finished model draws, for its record: figures alone do not show a collapse."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.data.image_set import ImageSet
from greenvis.tasks.base import Task

COUNT, SIDE, MOST = 10, 32, 12  # images a setting, their longest side, settings


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
        task: That draws.
        images: The test, whose range images are shown in.
        classes: Of which one image each is drawn, up to ten in all.
    """
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
        pixels = stored(shown, images)
        raw = zlib.compress(pixels.numpy().tobytes(), 9)
        text = base64.b64encode(raw).decode()
        out.append({"setting": name, "shape": [*pixels.shape], "pixels": text})
    return out


def stored(x: Tensor, images: ImageSet) -> Tensor:
    """Return normalised images as bytes, no larger than is shown: uint8 (n, channels, height,
    width)."""
    form = images.transform
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (form.mean, form.std))
    x = (x * std + mean).clamp(0, 1)
    if max(x.shape[-2:]) > SIDE:
        x = F.interpolate(x, scale_factor=SIDE / max(x.shape[-2:]), mode="area")
    return (x * 255).round().to(torch.uint8)
