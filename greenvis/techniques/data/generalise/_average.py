"""Answering with averaged weights: the model's own are back when training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from greenvis.core.technique import Installed
from greenvis.techniques._shared.attach import precise


class Mean:
    """A running mean of named tensors, in float32 or their own wider type.

    Args:
        values: The mean.
        count: Of how many.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None, count: int = 0) -> None:
        self.values, self.count = dict(values or {}), count

    def add(self, values: Mapping[str, Tensor], count: int = 1) -> None:
        """Take in tensors, or the mean of `count` of each."""
        self.count += count
        self.mix(values, count / self.count)

    def mix(self, values: Mapping[str, Tensor], share: float) -> None:
        """Move the mean towards tensors by a share; the first ones are the mean."""
        with torch.no_grad():
            for name, value in values.items():
                now = value.detach().to(precise(value))
                if name in self.values:
                    self.values[name].lerp_(now, share)
                else:
                    self.values[name] = now.clone()


class Averaging(Installed):
    """A technique whose model answers with `average` instead of the weights in training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # the tensors it is of, which `merge` meets when the model has other names
        self.tensors: dict[str, Tensor] = {}

    def average(self) -> Mapping[str, Tensor]:
        """Return what to answer with, by name; {} for the weights in training."""
        raise NotImplementedError

    def learning(self) -> dict[str, Tensor]:
        """Return what changes in training: parameters that train, and buffers with fractions."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        buffers = {
            f"{path}.{name}" if path else name: buffer
            for path, module in self.model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
            if name not in module._non_persistent_buffers_set
        }
        return {**named, **buffers}

    @contextmanager
    def served(self) -> Iterator[None]:
        """Hold the average in the model."""
        before = {n: t.detach().clone() for n, t in self.tensors.items()}
        self.merge()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(before[name])

    def merge(self) -> None:
        """Leave the average in the model."""
        with torch.no_grad():
            for name, value in self.average().items():
                self.tensors[name].copy_(value)

    def take(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loaded tensors on the devices of the model's, whose they are from now on."""
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.tensors = {**self.tensors, **{n: named[n] for n in values}}
        return {n: t.to(named[n].device, copy=True) for n, t in values.items()}
