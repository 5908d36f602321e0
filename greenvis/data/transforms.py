"""From a stored image to what the model sees. Augmentation is a function of seed, epoch and image,
never of a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from greenvis.data.spec import Augment
from greenvis.data.splits import UNKNOWN

# of colours and positions; none has a rule for masks and boxes
LIBRARY: dict[str, Callable[[Tensor], Tensor]] = {
    "color-jitter": v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1),
    "randaug": v2.RandAugment(num_ops=2, magnitude=9),
    "trivialaugment": v2.TrivialAugmentWide(),
    "augmix": v2.AugMix(),
}


@dataclass(frozen=True)
class Transform:
    """From stored images to what the model sees: size, channels, augmentation, normalisation, in
    this order."""

    img_size: int
    in_chans: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: Augment = "none"
    views: int | None = None
    seed: int = 0

    def fit(self, x: Tensor) -> Tensor:
        """Return uint8 (..., in_chans, img_size, img_size): shorter side resized, centre cropped,
        grey or colour as asked."""
        if x.shape[-2:] != (self.img_size, self.img_size):
            x = F.center_crop(
                F.resize(x, [self.img_size], antialias=True), [self.img_size, self.img_size]
            )
        if x.shape[-3] == self.in_chans:
            return x
        return (
            F.rgb_to_grayscale(x)
            if self.in_chans == 1
            else x.expand(*x.shape[:-3], self.in_chans, -1, -1)
        )

    def fit_mask(self, mask: Tensor) -> Tensor:
        """Return a mask (..., H, W) as `fit` leaves its image, the nearest pixel's label in each
        pixel: (..., img_size, img_size)."""
        if mask.shape[-2:] == (self.img_size, self.img_size):
            return mask
        side = [self.img_size]
        return F.center_crop(F.resize(tv_tensors.Mask(mask), side), side * 2).as_subclass(Tensor)

    def fit_boxes(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"boxes", "labels"} as `fit` leaves their image; what it cuts off is left out."""
        boxes, side = target["boxes"], [self.img_size]
        if tuple(boxes.canvas_size) == (self.img_size, self.img_size):
            return dict(target)
        return _within(F.center_crop(F.resize(boxes, side), side * 2), target["labels"])

    def view(self, epoch: int) -> int:
        """Return which augmented version of each image an epoch shows; epochs of one view show the
        very same pixels."""
        if self.augment == "none":
            return 0
        return epoch % self.views if self.views else epoch

    def change(self, x: Tensor, y: Any, ids: np.ndarray, epoch: int) -> tuple[Tensor, Any]:
        """Augment a batch: a function of seed, epoch (modulo views) and each image's id alone.

        Args:
            x: uint8 (B, C, H, W).
            y: Its labels; masks (B, H, W) and lists of boxes follow the images.
            ids: int64 (B,).
            epoch: From 0.

        Returns:
            x and y.
        """
        if self.augment == "none":
            return x, y
        draws = mix(ids, self.seed, self.view(epoch))
        if self.augment == "random-resized-crop":
            return _resized_crop(x, y, draws)
        if self.augment in LIBRARY:
            change = LIBRARY[self.augment]
            x = torch.stack(
                [_drawn(change, int(draw), image) for image, draw in zip(x, draws, strict=True)]
            )
        windows = _windows(draws, max(1, self.img_size // 8), flip=self.augment != "crop")
        if isinstance(y, list):
            y = [_crop_boxes(target, *window) for target, window in zip(y, windows, strict=True)]
        elif y.dim() == 3:
            y = _crop(y[:, None], windows, fill=UNKNOWN)[:, 0]
        return _crop(x, windows), y

    def normalise(self, x: Tensor) -> Tensor:
        """Return float32: (x / 255 - mean) / std by channel."""
        return F.normalize(
            F.to_dtype(x, torch.float32, scale=True), list(self.mean), list(self.std), inplace=True
        )


def mix(values: np.ndarray, *keys: int) -> np.ndarray:
    """Return one random uint64 for each value, a function of value and keys (SplitMix64, Steele et
    al., 2014)."""
    state = np.zeros(len(values), np.uint64)
    for part in (*keys, values):
        state = (
            state
            + np.asarray(part).astype(np.int64).astype(np.uint64)
            + np.uint64(0x9E3779B97F4A7C15)
        )
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


class _Window(NamedTuple):
    """What of an image, padded all around, is shown."""

    pad: int
    top: int
    left: int
    flip: bool


def _windows(draws: np.ndarray, pad: int, flip: bool) -> list[_Window]:
    """Return each image's own window; half of them are flipped left to right where asked."""
    offsets = np.uint64(2 * pad + 1)
    tops = (draws % offsets).astype(np.int64)
    lefts = (draws // offsets % offsets).astype(np.int64)
    flipped = (draws >> np.uint64(63)).astype(bool) if flip else np.zeros(len(draws), bool)
    each = zip(tops.tolist(), lefts.tolist(), flipped.tolist(), strict=True)
    return [_Window(pad, *window) for window in each]


def _crop(x: Tensor, windows: list[_Window], fill: int = 0) -> Tensor:
    """Pad by `fill` (black), cut out each image's own window, flip it where that says so."""
    side = x.shape[-1]
    padded = torch.nn.functional.pad(x, [windows[0].pad] * 4, value=fill) if windows else x
    out = torch.empty_like(x)
    for i, (_, top, left, flip) in enumerate(windows):
        window = padded[i, :, top : top + side, left : left + side]
        out[i] = window.flip(-1) if flip else window
    return out


def _crop_boxes(
    target: Mapping[str, Any], pad: int, top: int, left: int, flip: bool
) -> dict[str, Any]:
    """Return {"boxes", "labels"} as they lie in an image's window."""
    boxes: Any = target["boxes"]
    side = boxes.canvas_size[0]
    moved = boxes.as_subclass(Tensor).float() + torch.tensor([pad - left, pad - top] * 2)
    if flip:
        moved = torch.stack([side - moved[:, 2], moved[:, 1], side - moved[:, 0], moved[:, 3]], 1)
    return _within(bounding_boxes(moved, boxes.canvas_size), target["labels"])


def _within(boxes: Any, labels: Tensor) -> dict[str, Any]:
    """Return {"boxes", "labels"} of what lies in the canvas, by a pixel at least."""
    boxes = F.clamp_bounding_boxes(boxes)
    sides = boxes.as_subclass(Tensor)[:, 2:] - boxes.as_subclass(Tensor)[:, :2]
    rows = (sides >= 1).all(1)
    return {"boxes": bounding_boxes(boxes[rows], boxes.canvas_size), "labels": labels[rows]}


def bounding_boxes(corners: Tensor, canvas_size: tuple[int, ...]) -> tv_tensors.BoundingBoxes:
    """Return boxes that torchvision's transforms know.

    Args:
        corners: (boxes, 4), xyxy in pixels.
        canvas_size: (height, width) of their image.
    """
    boxes: Any = tv_tensors.BoundingBoxes
    form = tv_tensors.BoundingBoxFormat.XYXY
    return boxes(corners.float(), format=form, canvas_size=canvas_size)


def _resized_crop(x: Tensor, y: Any, draws: np.ndarray) -> tuple[Tensor, Any]:
    """Show a window of each image, of 8 to 100 % of its area and up to 4 : 3, brought to its size
    and flipped half the time; masks and boxes follow."""
    change = v2.Compose([v2.RandomResizedCrop(list(x.shape[-2:])), v2.RandomHorizontalFlip()])
    lies_on = isinstance(y, list) or y.dim() == 3
    images, targets = [], []
    for i, draw in enumerate(draws.tolist()):
        image = tv_tensors.Image(x[i])
        if not lies_on:
            images.append(_drawn(change, draw, image))
            continue
        own = y[i] if isinstance(y, list) else tv_tensors.Mask(y[i])
        image, own = _drawn(change, draw, image, own)
        images.append(image)
        if isinstance(y, list):
            targets.append(_within(own["boxes"], own["labels"]))
        else:
            targets.append(own.as_subclass(Tensor))
    out = torch.stack(images).as_subclass(Tensor) if images else x
    if not lies_on:
        return out, y
    return out, targets if isinstance(y, list) else torch.stack(targets)


def _drawn(change: Callable[..., Any], draw: int, *args: Any) -> Any:
    """Call what draws from torch's global generator: lend it a state of our own, give the old one
    back."""
    before = torch.get_rng_state()
    try:
        # the CPU's alone: torch.manual_seed would reseed GPUs too
        torch.default_generator.manual_seed(draw >> 1)
        return change(*args)
    finally:
        torch.set_rng_state(before)
