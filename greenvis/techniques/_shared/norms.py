"""Batch norms that go by other statistics than those of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenvis.core.modes import in_mode, untracked_norms
from greenvis.errors import BadInput


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms that track statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def require_norms(model: nn.Module, name: str) -> None:
    """Raise BadInput where a model has no batch norm whose statistics could be others."""
    if not batch_norms(model):
        raise BadInput(
            f"{name} changes the statistics of batch norms, and this {type(model).__name__} has "
            "none that tracks any: choose a network with batch norms"
        )


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms go by the statistics of their batch within, and nothing else be in train
    mode; what they track stays as it is."""
    with in_mode(model, False), untracked_norms(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        yield
