"""The mathematics of masked pretraining from a frozen base (TEC: Gao, Zhou, Cheng and Yan, 2022):
masks, targets, losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
ENCODER_ADAPTERS = (
    "encoder_adapters"  # what they are called where they lie beside a pretrained model
)


def random_mask(noise: Tensor, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the patches that stay visible: those of the lowest noise.

    Args:
        noise: (batch, patches).
        num_visible: patches that stay, per image.

    Returns:
        ids_keep, int64 (batch, visible), positions of the visible patches; restore, int64 (batch,
        patches), where each patch stands in [visible, masked]; mask, (batch, patches), 1 where
        hidden.
    """
    order = noise.argsort(1)
    restore = order.argsort(1)
    return order[:, :num_visible], restore, (restore >= num_visible).to(noise.dtype)


def visible(patches: Tensor, ids_keep: Tensor) -> Tensor:
    """Return the visible patches.

    Args:
        patches: (batch, patches, dim).
        ids_keep: their positions, int64 (batch, visible).

    Returns:
        (batch, visible, dim).
    """
    return patches.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def unshuffle(shown: Tensor, mask_token: Tensor, restore: Tensor) -> Tensor:
    """Put visible patches back to their positions, and the mask token to all others.

    Args:
        shown: (batch, visible, dim).
        mask_token: (1, 1, dim).
        restore: of `random_mask`, int64 (batch, patches).

    Returns:
        (batch, patches, dim).
    """
    hidden = mask_token.to(shown.dtype).expand(
        shown.shape[0], restore.shape[1] - shown.shape[1], -1
    )
    return visible(torch.cat([shown, hidden], 1), restore)


def normalise_tokens(features: Tensor, eps: float = EPS) -> Tensor:
    """Return features (batch, patches, channels) with zero mean and unit unbiased variance over the
    patches, by channel.

    Over the channels, as MAE normalises pixels, what tells one patch's channels apart would be
    lost.
    """
    centred = features - features.mean(1, keepdim=True)
    return centred / (features.var(1, keepdim=True) + eps).sqrt()


def normalise_channels(features: Tensor, eps: float = EPS) -> Tensor:
    """Return (batch, patches, channels) with zero mean and unit unbiased variance over the
    channels, by patch.

    MAE's normalisation of pixels (He et al., 2022).
    """
    return (features - features.mean(-1, keepdim=True)) / (
        features.var(-1, keepdim=True) + eps
    ).sqrt()


def top_patches(logits: Tensor, k: int) -> Tensor:
    """Return the k patches that the class token attends to most, by the mean over heads: int64
    (batch, k), best first.

    logits: (batch, heads, 1 + patches, patches), queries [class, patches] by keys, before the
    softmax.
    """
    return logits[:, :, 0].mean(1).topk(k, dim=1).indices


def attention_rows(logits: Tensor, top: Tensor) -> Tensor:
    """Return the logits of the class token's row and of the rows `top` (batch, k): (batch, 1 + k,
    heads, patches).

    logits: (batch, heads, 1 + patches, patches).
    """
    rows = torch.cat([top.new_zeros(len(top), 1), top + 1], 1)
    chosen = logits.gather(
        2, rows[:, None, :, None].expand(-1, logits.shape[1], -1, logits.shape[3])
    )
    return chosen.transpose(1, 2)


def feature_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the squared error (batch, patches, channels), averaged over the channels and the
    masked patches, a scalar."""
    return (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()


def attention_loss(predicted: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the cross entropy of attention maps, averaged over batch, rows and heads.

    Args:
        predicted, target: logits (…, patches).
        temperature: divides the target's logits only.

    Returns:
        A scalar.
    """
    return -((target / temperature).softmax(-1) * predicted.log_softmax(-1)).sum(-1).mean()


def sincos_2d(dim: int, height: int, width: int, prefix: int = 0) -> Tensor:
    """Return fixed position embeddings: sines and cosines of the column, then of the row.

    Args:
        dim: a multiple of 4. height, width: of the grid, in patches.
        prefix: tokens before the patches, which get zeros.

    Returns:
        (1, prefix + height · width, dim).
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = []
    for coordinate in (column, row):
        angle = coordinate.reshape(-1, 1).double() * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat([torch.zeros(prefix, dim), torch.cat(parts, 1).float()]).unsqueeze(0)


class TokenMlp(nn.Module):
    """Two linear layers with a GELU between, on the last axis: of width `hidden`, back to `dim`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderAdapters(nn.Module):
    """One representation from those of all blocks: norm of all, one linear layer and residual MLP
    for each group; their sum.

    dim, depth: width and number of the blocks. group: blocks to a group (the last group may be
    smaller).
    """

    def __init__(self, dim: int, depth: int, group: int, hidden: int) -> None:
        super().__init__()
        self.widths = [dim * min(group, depth - i) for i in range(0, depth, group)]
        self.before, self.after = nn.LayerNorm(dim * depth), nn.LayerNorm(dim)
        self.fuse = nn.ModuleList(nn.Linear(width, dim) for width in self.widths)
        self.mlps = nn.ModuleList(TokenMlp(dim, hidden) for _ in self.widths)

    def forward(self, outputs: Tensor) -> Tensor:
        """outputs: the blocks' outputs side by side, (batch, tokens, depth · dim). Returns (batch,
        tokens, dim)."""
        fused = [
            fuse(part)
            for fuse, part in zip(
                self.fuse, self.before(outputs).split(self.widths, -1), strict=True
            )
        ]
        return self.after(
            torch.stack([x + mlp(x) for x, mlp in zip(fused, self.mlps, strict=True)]).sum(0)
        )


class Decoder(nn.Module):
    """The shared part of a decoder of several targets: fixed positions and pre-norm transformer
    blocks.

    grid: (height, width) in patches. prefix: tokens before the patches. Each target brings its own
    `Entry`.
    """

    positions: Tensor

    def __init__(
        self, dim: int, depth: int, heads: int, grid: tuple[int, int], prefix: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, 0.0, "gelu", EPS, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.register_buffer("positions", sincos_2d(dim, *grid, prefix), persistent=False)

    def forward(self, encoded: Tensor, entry: Entry, restore: Tensor) -> Tensor:
        """Decode for one target.

        Args:
            encoded: (batch, prefix + visible, encoder dim).
            entry: the target's.
            restore: of `random_mask`, int64 (batch, patches).

        Returns:
            (batch, prefix + patches, decoder dim), normed for `entry`.
        """
        x = entry.embed(encoded)
        x = torch.cat(
            [x[:, : self.prefix], unshuffle(x[:, self.prefix :], entry.mask_token, restore)], 1
        )
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return entry.norm(x)


class Entry(nn.Module):
    """What a target has of its own in the decoder: embedding, mask token, norm."""

    def __init__(self, dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(dim, decoder_dim), nn.LayerNorm(decoder_dim, eps=EPS)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim).normal_(std=0.02))


class FeatureHead(Entry):
    """Predicts features of every patch."""

    def __init__(self, dim: int, decoder_dim: int, width: int) -> None:
        super().__init__(dim, decoder_dim)
        self.predict = nn.Linear(decoder_dim, width)

    def forward(self, decoded: Tensor, prefix: int) -> Tensor:
        """decoded: (batch, prefix + patches, decoder dim). Returns (batch, patches, width)."""
        return self.predict(decoded[:, prefix:])


class AttentionHead(Entry):
    """Predicts rows of the base's attention: one projection to queries and keys of all heads,
    scaled by 1 / √width.

    width: of all heads together, the base's. That is not the usual 1 / √(width of one head).
    """

    def __init__(self, dim: int, decoder_dim: int, width: int, heads: int) -> None:
        super().__init__(dim, decoder_dim)
        self.qk = nn.Linear(decoder_dim, 2 * width)
        self.heads, self.scale = heads, width**-0.5

    def forward(self, decoded: Tensor, prefix: int, top: Tensor) -> Tensor:
        """Predict rows of the base's attention.

        Without prefix tokens the mean of all patches' queries stands for the class token's.

        Args:
            decoded: (batch, prefix + patches, decoder dim).
            top: patches whose rows are predicted, int64 (batch, k).
            prefix: tokens before the patches.

        Returns:
            Logits (batch, 1 + k, heads, patches).
        """
        q, k = self.qk(decoded).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        patches = q[:, :, prefix:]
        first = q[:, :, :1] if prefix else patches.mean(2, keepdim=True)
        chosen = patches.gather(2, top[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        logits = torch.cat([first, chosen], 2) @ k[:, :, prefix:].transpose(-2, -1) * self.scale
        return logits.transpose(1, 2)


def decoder_size(dim: int, width: int | None = None) -> tuple[int, int]:
    """Return width and heads of a decoder for an encoder of width `dim`: two thirds of it, 32 a
    head (MAE's 512 for 768)."""
    width = max(8, round(dim / 12) * 8) if width is None else width
    return width, next(h for h in range(max(1, width // 32), 0, -1) if width % h == 0)
