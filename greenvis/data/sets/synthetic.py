"""Images drawn by seed: a data set without files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from greenvis.data.splits import Stored


class Synthetic(DataSet):
    """Each class is a smooth pattern, shifted and dimmed, under another pattern and noise.

    The shift keeps a linear model from solving it; a small convolutional net gets most of it right.
    Draws 2,000 images to train and 500 to test, 32 pixels in colour, unless asked for others.
    """

    name = "synthetic"
    source = "drawn by greenvis"
    licence = "CC0-1.0"
    size = {"train": 100_000, "test": 100_000}
    classes = tuple(f"class{i}" for i in range(10))

    def read(self) -> Stored:
        """Return as many as asked for."""
        import torch

        from greenvis.data.splits import Split, Stored, sha256

        spec, classes = self.spec, len(self.classes)
        img_size, in_chans = spec.img_size or 32, spec.in_chans or 3
        rng = torch.Generator().manual_seed(spec.seed)
        patterns = _smooth(classes, img_size, in_chans, rng)
        splits = []
        for count in (spec.train or 2000, spec.test or 500):
            labels = torch.arange(count) % classes
            strength = 0.5 + torch.rand(count, 1, 1, 1, generator=rng)
            shift = torch.randint(0, img_size, (count, 2), generator=rng)
            x = torch.stack(
                [
                    patterns[c].roll((int(dy), int(dx)), (-2, -1))
                    for c, (dy, dx) in zip(labels, shift, strict=True)
                ]
            )
            x = (
                x * strength
                + 0.7 * _smooth(count, img_size, in_chans, rng)
                + 0.5 * torch.randn(x.shape, generator=rng)
            )
            splits.append(Split((x * 40 + 128).clamp(0, 255).to(torch.uint8), labels))
        names = tuple(f"class{i}" for i in range(classes))
        checksum = sha256(part.numpy().tobytes() for s in splits for part in (s.images, s.labels))
        return Stored(splits[0], splits[1], names, checksum, img_size, in_chans)


def _smooth(count: int, img_size: int, in_chans: int, rng: torch.Generator) -> Tensor:
    import torch

    coarse = torch.randn(count, in_chans, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(
        coarse, size=(img_size, img_size), mode="bilinear", align_corners=False
    )
