"""A conditional generative adversarial network: draws images of a class."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

CODE, WIDTH = 64, 32
SHIFT, CUT, LIGHT = 0.125, 0.5, 0.5  # shares of the side and of the range (Zhao et al., 2020)


class Change(NamedTuple):
    """A change of images, which their gradients pass through.

    Args:
        light: Added to all values of an image, (batch,).
        shift: Rows and columns, int64 (batch, 2).
        cut: Row and column of the middle of a square that is blanked, int64 (batch, 2).
    """

    light: Tensor
    shift: Tensor
    cut: Tensor


def change_of(images: Tensor) -> Change:
    """Draw a change for images (batch, channels, height, width)."""
    count, device = len(images), images.device
    sides = torch.tensor(images.shape[-2:], device=device)
    most = (sides * SHIFT).round()
    shift = ((2 * torch.rand(count, 2, device=device) - 1) * (most + 0.499)).round().long()
    cut = (torch.rand(count, 2, device=device) * sides).long()
    return Change((torch.rand(count, device=device) - 0.5) * LIGHT, shift, cut)


def changed(images: Tensor, change: Change) -> Tensor:
    """Return images made lighter or darker, shifted, and with a square blanked (DiffAugment: Zhao
    et al., 2020), all by sums and products, so that gradients pass.

    Args:
        images: (batch, channels, height, width), about 0 in the middle of their range.
        change: One for each.
    """
    height, width = images.shape[-2:]
    x = images + change.light.view(-1, 1, 1, 1)
    rows = torch.arange(height, device=x.device)[None] + change.shift[:, :1]
    columns = torch.arange(width, device=x.device)[None] + change.shift[:, 1:]
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None]
    number = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[
        number, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    ].permute(0, 3, 1, 2)
    sides = [torch.arange(n, device=x.device)[None] for n in (height, width)]
    far = [
        (2 * (side - middle[:, None]) + (n % 2 == 0)).abs() > n * CUT
        for side, middle, n in zip(sides, change.cut.unbind(1), (height, width), strict=True)
    ]
    return moved * (inside & (far[0][:, :, None] | far[1][:, None]))[:, None]


def _within(positions: Tensor, count: int) -> Tensor:
    return (positions >= 0) & (positions < count)


def judge_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """Return the hinge loss of who tells real images from drawn ones (Lim and Ye, 2017, eq. 4).

    Args:
        real: Verdicts on real images (batch,).
        drawn: On drawn ones.
    """
    return (1 - real).relu().mean() + (1 + drawn).relu().mean()


class Generator(nn.Module):
    """Draws images in [−1, 1] of classes.

    Args:
        num_classes: Classes.
        shape: (channels, height, width) of the images, of any size.
    """

    def __init__(self, num_classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape, self.sides = shape, [-(-side // 4) for side in shape[1:]]
        self.classes = nn.Embedding(num_classes, CODE)
        self.first = nn.Linear(2 * CODE, 4 * WIDTH * self.sides[0] * self.sides[1])
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4 * WIDTH), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(4 * WIDTH, 2 * WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * WIDTH), nn.ReLU(), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, shape[0], 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, y: Tensor) -> Tensor:
        """Return an image (batch, channels, height, width) of each class (batch,)."""
        code = torch.randn(len(y), CODE, device=y.device)
        x = self.first(torch.cat([code, self.classes(y)], 1))
        drawn = self.layers(x.view(len(y), 4 * WIDTH, *self.sides))
        return drawn[..., : self.shape[1], : self.shape[2]]


class Judge(nn.Module):
    """Says how real images of a class look, by projection (Miyato and Koyama, 2018), with spectral
    norms (Miyato et al., 2018).

    Args:
        num_classes: Classes.
        in_chans: Channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(in_chans, WIDTH, 3, padding=1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(WIDTH, 2 * WIDTH, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * WIDTH, 4 * WIDTH, 4, 2, 1)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.last = spectral_norm(nn.Linear(4 * WIDTH, 1))
        self.classes = spectral_norm(nn.Embedding(num_classes, 4 * WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return verdicts (batch,) on images (batch, channels, height, width) of classes y."""
        features = self.layers(x).sum((2, 3))
        return self.last(features).squeeze(1) + (self.classes(y) * features).sum(1)


def step(
    generator: Generator, judge: Judge, x: Tensor, y: Tensor,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> tuple[float, float]:  # fmt: skip
    """Train the judge, then the generator, on real images in [−1, 1] of classes y.

    Args:
        generator: In train mode.
        judge: In train mode.
        x: (batch, channels, height, width).
        y: (batch,).
        optimizers: The generator's and the judge's.

    Returns:
        Their losses.
    """
    of_generator, of_judge = optimizers
    with torch.no_grad():
        drawn = generator(y)
    verdicts = (judge(changed(images, change_of(images)), y) for images in (x, drawn))
    own = judge_loss(*verdicts)
    of_judge.zero_grad()
    own.backward()
    of_judge.step()
    drawn = generator(y)
    loss = -judge(changed(drawn, change_of(drawn)), y).mean()
    of_generator.zero_grad()
    loss.backward()
    of_generator.step()
    return loss.item(), own.item()


def in_range(pixels: Tensor) -> Tensor:
    """Return images of values 0 to 1 in [−1, 1]."""
    return F.hardtanh(pixels * 2 - 1)
