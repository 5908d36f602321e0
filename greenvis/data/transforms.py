"""From a stored image to what the model sees. Augmentation is a function of seed, epoch and image,
never of a worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from greenvis.data.spec import Augment

_RANDAUGMENT = v2.RandAugment(num_ops=2, magnitude=9)


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

    def view(self, epoch: int) -> int:
        """Return which augmented version of each image an epoch shows; epochs of one view show the
        very same pixels."""
        if self.augment == "none":
            return 0
        return epoch % self.views if self.views else epoch

    def change(self, x: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
        """Augment a batch (B, C, H, W), uint8: a function of seed, epoch (modulo views) and each
        image's id alone."""
        if self.augment == "none":
            return x
        draws = mix(ids, self.seed, self.view(epoch))
        if self.augment == "randaug":
            x = torch.stack(
                [_randaugment(image, int(draw)) for image, draw in zip(x, draws, strict=True)]
            )
        return _crop(x, draws, pad=max(1, self.img_size // 8), flip=self.augment != "crop")

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


def _crop(x: Tensor, draws: np.ndarray, pad: int, flip: bool) -> Tensor:
    """Pad by black, cut out each image's own window, flip half of them left to right where
    asked."""
    side, offsets = x.shape[-1], np.uint64(2 * pad + 1)
    tops = (draws % offsets).astype(np.int64)
    lefts = (draws // offsets % offsets).astype(np.int64)
    flipped = (draws >> np.uint64(63)).astype(bool) if flip else np.zeros(len(draws), bool)
    padded = F.pad(x, [pad])
    out = torch.empty_like(x)
    for i, (top, left, turn) in enumerate(
        zip(tops.tolist(), lefts.tolist(), flipped.tolist(), strict=True)
    ):
        window = padded[i, :, top : top + side, left : left + side]
        out[i] = window.flip(-1) if turn else window
    return out


def _randaugment(image: Tensor, draw: int) -> Tensor:
    """RandAugment draws from torch's global generator: lend it a state of our own, give the old one
    back."""
    before = torch.get_rng_state()
    try:
        # the CPU's alone: torch.manual_seed would reseed GPUs too
        torch.default_generator.manual_seed(draw >> 1)
        return _RANDAUGMENT(image)
    finally:
        torch.set_rng_state(before)
