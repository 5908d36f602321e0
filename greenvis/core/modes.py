"""What holds for a while: train and eval mode, hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Hold a model in train or in eval mode; each of its modules gets its own mode back, however
    the block ends."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def untracked_norms(model: nn.Module) -> Iterator[None]:
    """Let batch norms in train mode go by the statistics of their batch within, and leave those
    that they track as they are."""
    tracking = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True  # type: ignore[assignment]


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, however the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
