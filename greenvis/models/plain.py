"""Small models of our own, by reference `plain/NAME`: the ones continual learning's literature is
measured on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(
    *,
    num_classes: int = 10,
    in_chans: int = 1,
    img_size: int = 28,
    hidden: Sequence[int] = (100, 100),
) -> nn.Sequential:
    """Return a multi-layer perceptron on flattened images: Linear and ReLU for each of `hidden`,
    then the classifier.

    Weights start as Glorot and Bengio (2010) have it, uniform, biases at 0.

    Args:
        num_classes: Outputs.
        in_chans: Channels of the images.
        img_size: Their side in pixels.
        hidden: Width of each hidden layer.

    Returns:
        The model.
    """
    widths = [in_chans * img_size**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], num_classes))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
