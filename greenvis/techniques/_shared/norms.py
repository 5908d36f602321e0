"""Batch norms that go by other statistics than those of training."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from greenvis.core.modes import in_mode, removing, untracked_norms
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


class Moments:
    """Mean and variance by channel of all that it is shown, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in activations (batch, channels, …)."""
        axes = [i for i in range(x.dim()) if i != 1]
        values = x.detach().double()
        self.count += values.numel() // values.shape[1]
        self.total = self.total + values.sum(axes)
        self.squares = self.squares + values.square().sum(axes)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance, (channels,) each."""
        mean = torch.as_tensor(self.total) / self.count
        spread = torch.as_tensor(self.squares) / self.count - mean.square()
        return mean, spread.clamp_min(0) * (self.count / max(self.count - 1, 1))


class Statistics:
    """Mean and variance of what each batch norm of a model is given, over all of some images.

    Args:
        model: Whose norms go by the statistics of their batch meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._norms: list[Any] = list(batch_norms(model).values())
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def known(self) -> bool:
        """Whether they are estimated, and not forgotten since."""
        return bool(self._values)

    def forget(self) -> None:
        """Forget them: the weights have changed."""
        self._values.clear()

    def estimate(self, batches: Iterable[Tensor], most: int | None = None) -> int:
        """Go through images once, without gradients.

        Args:
            batches: Images (batch, channels, height, width); of one image alone a batch norm has
                nothing to say.
            most: Images to look at; None: all.

        Returns:
            How many images were looked at.
        """
        moments = {id(m): Moments() for m in self._norms}
        hooks = [m.register_forward_pre_hook(partial(_look, moments[id(m)])) for m in self._norms]
        shown, most = 0, sys.maxsize if most is None else most
        with removing(hooks), batch_statistics(self.model), torch.no_grad():
            for batch in batches:
                x = batch[: most - shown]
                if len(x) > 1:
                    self.model(x)
                    shown += len(x)
                if shown + 1 >= most:
                    break
        self._values = {key: m.result() for key, m in moments.items() if m.count}
        return shown

    def put(self) -> None:
        """Leave them in the norms."""
        for norm in self._norms:
            if id(norm) in self._values:
                self._put(norm, self._values[id(norm)])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give the norms back at the end what they have now."""
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self._norms]
        try:
            yield
        finally:
            for norm, values in zip(self._norms, before, strict=True):
                self._put(norm, values)

    @torch.no_grad()
    def _put(self, norm: Any, values: tuple[Tensor, Tensor]) -> None:
        norm.running_mean.copy_(values[0])
        norm.running_var.copy_(values[1])


def _look(moments: Moments, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    moments.add(args[0])
