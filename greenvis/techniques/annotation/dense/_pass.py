"""The mathematics of pretraining for pixels (PASS: Gao et al., 2022), on SwAV's assignments (Caron
et al., 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTACHED = "attention_to_pixels"  # its name where it lies beside a model
NOWHERE = -2.0  # a coordinate outside of every view, where zeros are read


def sinkhorn(scores: Tensor, epsilon: float, turns: int) -> Tensor:
    """Return soft assignments to prototypes that use all of them alike (SwAV, equation 3).

    Args:
        scores: (batch, prototypes), cosines.
        epsilon: smaller is harder.
        turns: of normalising rows and columns.

    Returns:
        (batch, prototypes), each row's sum is 1, without a gradient.
    """
    q = ((scores.detach() - scores.detach().max()) / epsilon).exp()
    q = q / q.sum()
    for _ in range(turns):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swapped_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of each view's scores with the other view's codes, a scalar.

    Args:
        scores: (2, batch, prototypes).
        codes: of `sinkhorn`, (2, batch, prototypes).
        temperature: divides the scores.
    """
    logs = (scores / temperature).log_softmax(-1)
    return -(codes.flip(0) * logs).sum(-1).mean()


def overlap_grids(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Return the same places of images, in the coordinates of two views: a grid over what both
    show.

    A place is mapped to each view by the inverse of the view's own map, so that a view's place
    reaches the other's through both, whichever of them is turned.

    Args:
        first, second: from a view's coordinates to the image's, (batch, 2, 3), without rotation.
        size: places to a side.

    Returns:
        (2, batch, size, size, 2), for `torch.nn.functional.grid_sample`; -2 where the views share
        nothing.
    """
    maps = torch.stack([first, second])
    scale, shift = torch.stack([maps[..., 0, 0], maps[..., 1, 1]], -1), maps[..., 2]
    low = (shift - scale.abs()).amax(0)
    high = (shift + scale.abs()).amin(0)  # (batch, 2), x first
    steps = (torch.arange(size, device=maps.device) + 0.5) / size
    across, down = (
        low[:, i, None] + (high - low)[:, i, None] * steps for i in range(2)
    )  # (batch, size)
    places = torch.stack(
        [across[:, None].expand(-1, size, -1), down[:, :, None].expand(-1, -1, size)], -1
    )
    grids = (places - shift[:, :, None, None]) / scale[:, :, None, None]
    shared = (low < high).all(-1)[None, :, None, None, None]
    return torch.where(shared, grids, NOWHERE)


def pixel_loss(predicted: Tensor, embedding: Tensor) -> Tensor:
    """Return minus the cosine of each view's prediction with the other's embedding, at the same
    places: the mean of both directions, a scalar.

    Args:
        predicted: (2, batch, dim, size, size).
        embedding: likewise; no gradient flows there.
    """
    return -F.cosine_similarity(predicted, embedding.detach().flip(0), dim=2).mean()


def at_places(maps: Tensor, grids: Tensor) -> Tensor:
    """Return features (batch, channels, height, width) at places (batch, size, size, 2): (batch,
    channels, size, size)."""
    return F.grid_sample(maps, grids.to(maps.dtype), align_corners=False)


class Prototypes(nn.Module):
    """Cosines with prototypes that learn, of vectors of length 1."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim).normal_())
        self.learns = True

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """Return (batch, prototypes) of (batch, dim)."""
        weight = self.weight
        if not (learn and self.learns):  # without learning its gradient is 0, not missing
            weight = weight.detach() + 0 * weight
        return F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))


def pixel_mlp(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Return three 1×1 convolutions with batch norms, the last without weights."""
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
        nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim, affine=False),
    )  # fmt: skip


def projection(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Return two linear layers with batch norms, the last without weights."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, dim), nn.BatchNorm1d(dim, affine=False),
    )  # fmt: skip


class Attention(nn.Module):
    """How much each channel of each place counts: σ(M(‖z‖) + θ), M of two 1×1 convolutions with
    batch norms, θ one number a channel, 0 at first (PASS, equation 5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.threshold = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Return the attention (batch, channels, height, width) to features of length 1."""
        return (self.layers(features) + self.threshold).sigmoid()


def otsu(values: Tensor, bins: int = 256) -> float:
    """Return the threshold that parts numbers into two groups of the least variance within (Otsu,
    1979).

    Args:
        values: (n,).
        bins: of the histogram that is looked at.
    """
    values = values.double()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts = torch.histc(values.float(), bins, low, high).double()
    width = (high - low) / bins
    centres = low + width * (torch.arange(bins, dtype=torch.float64) + 0.5)
    below, above = counts.cumsum(0)[:-1], counts.flip(0).cumsum(0).flip(0)[1:]
    sums = (counts * centres).cumsum(0)
    apart = sums[:-1] / below.clamp(min=1) - (sums[-1] - sums[:-1]) / above.clamp(min=1)
    return low + width * (int((below * above * apart.square()).argmax()) + 1)
