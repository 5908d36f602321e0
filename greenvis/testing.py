"""The contract every technique keeps, as a check plug-in authors can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Host:
    """A small model to try techniques on. input_shape: (channels, height, width). The same weights at each `build()`."""

    name: str
    builder: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    classes: int

    def build(self) -> nn.Module:
        """Return a new model, in train mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.builder().train()
