"""What a buffer holds at a task's end: of each class, images whose mean feature stays nearest the
class's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.data.herding import herding
from greenvis.models.structure import view
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques.iteration.continual._buffer import Buffer


def replace_by_herding(buffer: Buffer, model: nn.Module, loader: Any) -> None:
    """Choose the examples of a finished task's classes, and as many of each class before it.

    Args:
        buffer: Holds its first ones of each earlier class afterwards, and the chosen ones.
        model: Whose features are looked at.
        loader: Yields (x, y) of the finished task.
    """
    by_class: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for x, y, features in _features(model, loader):
        for label in y.unique().tolist():
            by_class.setdefault(label, []).append((x[y == label], features[y == label]))
    old_x, old_y = buffer.take(range(len(buffer))) if len(buffer) else (None, torch.zeros(0))
    before = [c for c in dict.fromkeys(old_y.long().tolist()) if c not in by_class]
    share = max(1, buffer.size // (len(before) + len(by_class)))
    xs = [] if old_x is None else [old_x[old_y == c][:share] for c in before]
    ys = [torch.full((len(x),), c) for x, c in zip(xs, before, strict=True)]
    for label, parts in by_class.items():
        images, features = (torch.cat(column) for column in zip(*parts, strict=True))
        xs.append(images[herding(F.normalize(features.double(), dim=1), share)])
        ys.append(torch.full((len(xs[-1]),), label))
    buffer.replace(torch.cat(xs)[: buffer.size], torch.cat(ys)[: buffer.size])


def _features(model: nn.Module, loader: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield x, y and what the classifier is given for x, (batch, values), on the CPU."""
    representation = None
    device = next(model.parameters()).device
    for x, y in loader:
        representation = representation or Representation(
            model, view(model, tuple(x.shape[1:]), probe=False)
        )
        with probing(model):
            features = representation(x.to(device))
        yield x.cpu(), y.cpu(), features.float().cpu()
