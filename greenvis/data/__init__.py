"""Which images, with which labels, in which order: data sets, transforms, streams, kept outputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenvis.data.dataset import DataSet
    from greenvis.data.feed import Feed
    from greenvis.data.image_set import ImageSet
    from greenvis.data.loaders import batches, order
    from greenvis.data.loading import check, load
    from greenvis.data.roles import Data
    from greenvis.data.spec import DataSpec
    from greenvis.data.splits import Split, Stored

# a recipe is read without torch, which most of these import
_HOMES = {
    "Data": "roles",
    "DataSet": "dataset",
    "DataSpec": "spec",
    "Feed": "feed",
    "ImageSet": "image_set",
    "Split": "splits",
    "Stored": "splits",
    "batches": "loaders",
    "check": "loading",
    "load": "loading",
    "order": "loaders",
}
__all__ = [
    "Data", "DataSet", "DataSpec", "Feed", "ImageSet", "Split", "Stored", "batches", "check",
    "load", "order",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"greenvis.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'greenvis.data' has no attribute '{name}'")
