"""Small diffusion models, with the same weights each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from greenvis import models
from greenvis.models.diffusion import Diffusion

UNET: dict[str, Any] = {
    "img_size": 8, "in_chans": 1, "num_classes": 3, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "layers_per_block": 1,
}  # fmt: skip


def diffusion(**options: Any) -> Diffusion:
    """Return a U-Net that draws images of 8 × 8 in three classes, or in as many as is said."""
    pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        more = {"times": 40, "schedule": "scaled_linear", **UNET, **options}
        model = models.build("diffusers/UNet2DModel", head="images", **more)
    assert isinstance(model, Diffusion)
    model.range.copy_(torch.tensor([0.0, 1.0]))
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Return five images and their classes."""
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 2, 1, 1, 0])


def noise(count: int = 5, seed: int = 0) -> Tensor:
    """Return what a run begins with."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
