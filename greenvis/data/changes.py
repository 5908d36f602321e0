"""Domains by name: what a domain does to the images of another, by severity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from greenvis.data.image_set import ImageSet
from greenvis.data.transforms import Transform, mix
from greenvis.errors import BadInput

# by name: the severity where none is named, and what it counts
SEVERITIES: dict[str, tuple[float, str]] = {
    "rotate": (30.0, "degrees counter-clockwise"),
    "permute": (1.0, "seed of the permutation of pixels"),
    "noise": (0.3, "deviation of normal noise, where white is 1"),
    "blur": (1.0, "deviation of a normal blur, in pixels of 28 a side"),
    "contrast": (0.3, "factor about the image's mean"),
    "brightness": (0.4, "added, where white is 1"),
    "invert": (1.0, "share of the way to the negative"),
    "texture": (0.5, "share of a cloud of its own in each image"),
}
PLAIN = "plain"
SORTED = "sorted:"  # before the name of a test: class by class
BLUR_SIDE = 28  # pixels: a blur is as wide in larger images
CLOUD = 7  # cells of a cloud's grid a side


def in_order(images: ImageSet, name: str) -> ImageSet:
    """Return a test in the order that its name asks for: as it is, or sorted by class."""
    if not name.startswith(SORTED):
        return images
    return images.take(images.classes("a sorted test").argsort(stable=True))


def parse(name: str) -> Change | None:
    """Return the change that a domain is known by, "blur" or "blur:2"; None for any other name.

    Raises:
        BadInput: For a severity that is none.
    """
    kind, colon, text = name.partition(":")
    if kind == PLAIN and not colon:
        return Change()
    if kind not in SEVERITIES:
        return None
    try:
        severity = float(text) if colon else SEVERITIES[kind][0]
        if not np.isfinite(severity) or (kind == "permute" and severity != int(severity)):
            raise ValueError
    except ValueError:
        meaning = SEVERITIES[kind][1]
        raise BadInput(f"domain '{name}': after the colon stands a number, {meaning}") from None
    if kind == "rotate":
        return Change(degrees=severity)
    if kind == "permute":
        return Change(seed=int(severity))
    return Change(kind=kind, severity=severity)


@dataclass(frozen=True)
class Change:
    """What a domain does to images: a turn by `degrees`, counter-clockwise, a permutation of pixels
    (from `seed`), or what `kind` names."""

    degrees: float = 0.0
    seed: int | None = None
    kind: str = ""
    severity: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether pixels change their position."""
        return bool(self.degrees) or self.seed is not None

    def __str__(self) -> str:
        # as caches are keyed on
        other = f", kind={self.kind!r}, severity={self.severity}" if self.kind else ""
        return f"Change(degrees={self.degrees}, seed={self.seed}{other})"

    def __call__(self, x: Tensor, form: Transform, ids: np.ndarray) -> Tensor:
        """Return images changed, a function of the images and their ids alone.

        Args:
            x: float32 (B, C, H, W), normalised.
            form: How they were.
            ids: int64 (B,), from which noise and clouds are drawn.
        """
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            permutation = torch.randperm(x.shape[-2] * x.shape[-1], generator=generator)
            return x.flatten(2)[:, :, permutation].unflatten(2, x.shape[-2:])
        if self.degrees:
            black = [-m / s for m, s in zip(form.mean, form.std, strict=True)]
            how = F.InterpolationMode.BILINEAR
            return F.rotate(x, self.degrees, interpolation=how, fill=black)
        if not self.kind:
            return x
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (form.mean, form.std))
        pixels = self._pixels(x * std + mean, ids).clamp(0, 1)
        return (pixels - mean) / std

    def _pixels(self, x: Tensor, ids: np.ndarray) -> Tensor:
        """Return pixels changed; of those in 0 to 1."""
        s = self.severity
        if self.kind == "noise":
            return x + s * _drawn(ids, tuple(x.shape[1:]))
        if self.kind == "blur":
            sigma = s * x.shape[-1] / BLUR_SIDE
            size = 2 * min(int(3 * sigma + 1), (x.shape[-1] - 1) // 2) + 1
            return F.gaussian_blur(x, [size, size], [sigma, sigma]) if size > 1 else x
        if self.kind == "contrast":
            mean = x.mean((1, 2, 3), keepdim=True)
            return mean + s * (x - mean)
        if self.kind == "brightness":
            return x + s
        if self.kind == "invert":
            return x + s * (1 - 2 * x)
        cloud = torch.sigmoid(2 * _drawn(ids, (1, CLOUD, CLOUD)))
        cloud = F.resize(cloud, list(x.shape[-2:]), F.InterpolationMode.BICUBIC)
        return (1 - s) * x + s * cloud


def _drawn(ids: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return normal noise for each id, (B, *shape): its own, whatever the batch."""
    seeds = (mix(ids, 9176) >> np.uint64(1)).tolist()
    each = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(each) if each else torch.zeros(0, *shape)


class Changed(ImageSet):
    """Images as one domain shows them.

    Raises:
        BadInput: Where pixels change their position, and labels lie on them.
    """

    def __init__(self, images: ImageSet, change: Change) -> None:
        super().__init__(images.split, images.ids, images.transform)
        self.images, self.change = images, change
        if change.moves and images.split.kind in ("mask", "box"):
            raise BadInput(
                f"a domain that moves pixels has no rule for labels of kind {images.split.kind}: "
                "choose noise, blur, contrast, brightness, invert or texture"
            )

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Any, Any]:
        """Return x float32 (B, C, H, W), normalised and changed, and y."""
        x, y = self.images.batch(positions, epoch)
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return self.change(x, self.transform, self.ids[rows].numpy()), y

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset of the same domain."""
        return Changed(self.images.take(positions), self.change)

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same images, brought to size and augmented otherwise."""
        return Changed(self.images.shown(transform), self.change)

    def relabeled(self, labels: Any) -> ImageSet:
        """Return the same images with other labels."""
        return Changed(self.images.relabeled(labels), self.change)

    def unlabeled(self) -> ImageSet:
        """Return the same images, of which nothing is known."""
        return Changed(self.images.unlabeled(), self.change)

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on."""
        return {**self.images.key(), "domain": str(self.change)}
