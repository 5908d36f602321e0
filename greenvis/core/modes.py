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
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, however the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
