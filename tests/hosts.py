"""The models the contract is tried on (those of `greenvis bench coverage`), a small one to measure
by hand, and what must not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from greenvis.bench._hosts import CLASSES, HOSTS, Plain
from greenvis.core.surgery import Snapshot

__all__ = ["CLASSES", "HOSTS", "Plain", "unchanged", "vit"]


def vit(**more: Any) -> Any:
    """Return a vision transformer of two blocks, for images of 32 pixels, 16 patches each."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**size, "num_classes": 5, **more}).eval()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that what happens within leaves a model bit for bit as it was."""
    before, keys = Snapshot(model), list(model.state_dict())
    yield
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
