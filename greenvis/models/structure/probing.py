"""Run a model without leaving a mark on it, and guess the image shape it takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.surgery import is_container

_PROBING = "_greenvis_looked_at"
_LEARNING = "_greenvis_learning"


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Run a model without leaving a mark on it: eval, no gradients, no fused fast path, random
    state forked; modes, buffers and attributes are restored.

    Args:
        model: The model.
    """
    saved = [(m, dict(vars(m)), _containers(m)) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    fast = torch.backends.mha.get_fastpath_enabled()
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        vars(model)[_PROBING] = True  # gone with the other attributes
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, attributes, containers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for container, value in containers:
                if container or value:
                    container.clear()
                    container.extend(value) if isinstance(container, list) else container.update(
                        value
                    )
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def is_probing(model: nn.Module) -> bool:
    """Whether this model runs in `probing`, where every part has to run: no early exits."""
    return _PROBING in vars(model)


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Within, heads that learn beside the model's own answer run as in a training step, whatever
    the modes are."""
    vars(model)[_LEARNING] = True
    try:
        yield
    finally:
        vars(model).pop(_LEARNING, None)


def is_learning(model: nn.Module) -> bool:
    """Whether this model runs in `learning`."""
    return _LEARNING in vars(model)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the dictionaries, lists and sets a module holds, each with a copy; most are empty."""
    held = (v for v in vars(module).values() if is_container(v))
    return [(v, copy.copy(v) if v else ()) for v in held]


def image(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """Return one random image (1, channels, height, width), always the same, where the model is and
    in its precision."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(
        first.device, first.dtype
    )


def shapes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Yield (channels, height, width) to try, the likeliest first."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = conv.in_channels if conv is not None else getattr(config, "num_channels", None)
    hints = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(config, "image_size", None),
        getattr(model, "image_size", None),
        getattr(model, "img_size", None),
        tuple(pretrained.get("input_size", ()))[1:] or None,
    )
    for hint in hints:
        pair = (
            (hint, hint)
            if isinstance(hint, int)
            else tuple(hint)
            if isinstance(hint, (tuple, list))
            else ()
        )
        if len(pair) == 2:
            yield channels or 3, int(pair[0]), int(pair[1])
            # where pixels are re-arranged before the first convolution
            yield (3, int(pair[0]), int(pair[1]))
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if conv is None and linear is not None:  # a flattened image
        for c in (1, 3):
            side = math.isqrt(linear.in_features // c)
            if side * side * c == linear.in_features:
                yield c, side, side
    for size in (28, 32, 224) if channels == 1 else (224, 32, 64, 96, 128, 256, 384, 512):
        yield channels or 3, size, size
