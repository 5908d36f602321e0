"""What a training loop says of its images: which samples a batch holds, and which experience of a
stream they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Which samples a batch holds, so that what a frozen part gives for them can be cached
    (`greenvis.data.output_cache`).

    Args:
        folder: Where caches lie.
        key: What the images depend on, in words (`ImageSet.key`).
        length: Images in the data set.
        views: Augmented versions of each image; None where no version comes twice, so that nothing
            is worth caching.
        positions: int64 (batch,).
        view: Which version this batch shows, 0 to views - 1.
    """

    folder: Path
    key: Mapping[str, str]
    length: int
    views: int | None
    positions: Tensor
    view: int = 0


@dataclass(frozen=True)
class Experience:
    """One experience of a stream: the task it trains on, and what is known of it.

    Args:
        index: 0, 1, ….
        classes: The labels that occur in it.
        classes_so_far: Those that occurred so far, including its own, in order.
        count: Experiences in all, None where nobody knows.
        known: Whether a test says which task an image is of (task-incremental).
    """

    index: int
    classes: tuple[int, ...]
    classes_so_far: tuple[int, ...]
    count: int | None = None
    known: bool = False
