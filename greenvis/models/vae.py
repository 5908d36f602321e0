"""A conditional variational autoencoder: draws images of a class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT, HIDDEN = 16, 400


def elbo(pixels: Tensor, drawn: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return the negative evidence lower bound of images (n, values), 0 to 1 (Kingma and Welling,
    2014, eq. 10), a scalar.

    drawn: logits of the pixels. mean, log_var: of the code, (n, code). Summed over values and code,
    a mean over images.
    """
    reconstruction = F.binary_cross_entropy_with_logits(drawn, pixels, reduction="none").sum(1)
    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
    return (reconstruction + divergence).mean()


def networks(values: int, outputs: int) -> nn.ModuleDict:
    """Return "encoder" and "decoder", perceptrons of one hidden layer.

    Args:
        values: Of an image.
        outputs: Classes.
    """
    encoder = nn.Sequential(
        nn.Linear(values + outputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT)
    )
    decoder = nn.Sequential(
        nn.Linear(LATENT + outputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, values)
    )
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


class Vae(nn.Module):
    """Learns images of classes by the evidence lower bound (Kingma and Welling, 2014; Sohn et al.,
    2015), and draws such.

    Args:
        num_classes: Classes.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
    """

    range: Tensor

    def __init__(self, num_classes: int, in_chans: int, img_size: int) -> None:
        super().__init__()
        self.classes, self.shape = num_classes, (in_chans, img_size, img_size)
        self.networks = networks(in_chans * img_size**2, num_classes)
        # of the pixels seen in training
        self.register_buffer("range", torch.tensor([float("inf"), -float("inf")]))

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"loss": negative evidence lower bound per pixel} of images (batch, …) of classes
        (batch,); None: all of the first."""
        parts: Any = self.networks
        if y is None:
            y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.training:
            low, high = x.detach().aminmax()
            self.range.copy_(torch.stack([self.range[0].minimum(low), self.range[1].maximum(high)]))
        low, high = self.range
        pixels = ((x.flatten(1) - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
        hot = F.one_hot(y, self.classes).to(pixels)
        mean, log_var = parts["encoder"](torch.cat([pixels, hot], 1)).chunk(2, 1)
        code = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        drawn = parts["decoder"](torch.cat([code, hot], 1))
        return {"loss": elbo(pixels, drawn, mean, log_var) / pixels.shape[1]}

    def sample(self, y: Tensor) -> Tensor:
        """Return an image (batch, channels, height, width) of each class (batch,)."""
        parts: Any = self.networks
        hot = F.one_hot(y, self.classes).to(self.range)
        code = torch.randn(len(y), LATENT, device=hot.device)
        low, high = self.range
        pixels = parts["decoder"](torch.cat([code, hot], 1)).sigmoid()
        return (low + (high - low) * pixels).view(len(y), *self.shape)
