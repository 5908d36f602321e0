"""Masked autoencoding: pretraining from the images alone, the rival of every reuse of a base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared import tec as tec
from greenvis.techniques._shared.masked import Encoder, begin_anew
from greenvis.techniques._shared.words import Codebook, VisualWords, words_loss

_CHILD = "mae"
_BINS = 9


def patchify(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut images into patches.

    Args:
        images: (batch, channels, height, width).
        grid: (rows, columns) of patches.

    Returns:
        (batch, rows · columns, pixels · channels), channels last.
    """
    rows, columns = grid
    # (batch, channels, rows, p, columns, q)
    x = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def hog(images: Tensor, grid: tuple[int, int], bins: int = _BINS) -> Tensor:
    """Return histograms of oriented gradients (MaskFeat: Wei et al., 2022).

    Each pixel's gradient, by Sobel's filters, counts with its size in one of `bins` unsigned
    directions, channel by channel, over cells of a patch (two to a side where it has 8 pixels or
    more, else one); each cell's histogram has length 1. As the authors' code has it without its
    Gaussian window, for cells of any size.

    Args:
        images: (batch, channels, height, width).
        grid: (rows, columns) of patches.
        bins: directions per histogram.

    Returns:
        (batch, patches, features).
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    size = torch.hypot(across, down)
    direction = (torch.atan2(across, down) / math.pi % 1 * bins).floor().long() % bins
    votes = torch.zeros(*images.shape, bins, dtype=size.dtype, device=size.device)
    votes.scatter_(-1, direction.unsqueeze(-1), size.unsqueeze(-1))
    votes = votes.movedim(-1, 2).flatten(1, 2)  # (batch, channels · bins, height, width)
    patch = images.shape[-1] // grid[1]
    cells = 2 if patch >= 8 and patch % 2 == 0 else 1
    pooled = patchify(F.adaptive_avg_pool2d(votes, (grid[0] * cells, grid[1] * cells)), grid)
    by_cell = pooled.unflatten(-1, (cells * cells, images.shape[1], bins))
    return F.normalize(by_cell, dim=-1).movedim(3, 2).flatten(2)


class PatchWords(VisualWords):
    """Words of patches as they are in the image."""

    of: Literal["pixels", "hog"] = Field(
        default="pixels", description="what of a patch the words are learned from"
    )


class Mae(Technique):
    """Pretrain a vision transformer to reconstruct the patches it cannot see, as pixels (MAE: He et
    al., 2022), as histograms of their gradients (the target of MaskFeat: Wei et al., 2022), or as
    soft visual words (mc-BEiT: Li et al., 2022).

    Saves nothing by itself: it is what pretraining costs without a base. 75 % of the patches never
    enter the encoder, which makes a step cheaper than one of supervised training where the decoder
    is small; the published decoder (8 blocks, two thirds as wide) is not for a small encoder. A
    pretext: labels are not used, and the classifier stays untrained. Adds the term "mae": the
    squared error on masked patches, or the cross entropy with their words. `merge` drops the
    decoder. (MaskFeat and mc-BEiT themselves show mask tokens to the encoder; here it sees visible
    patches only, whatever the target.) Words are learned from training images before the first
    step, by mini-batch k-means in place of mc-BEiT's tokenizer, which a large set taught; patches
    that the decoder sees alike share their words, and no gradient flows that way. Refused where
    several processes train.

    Example:
        >>> live = gv.wrap(model, gv.Mae(mask_ratio=0.5))
        >>> live.pretext  # the loop calls neither the model nor the task's loss
        True
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "mae"
    only_with = {"normalise": ("target", ("pixels", "words"))}
    stage = "objective"
    tasks = IMAGES
    instead = IMAGES_ALONE
    needs = frozenset({"token_grid", "trainable_base"})
    neutral = {"init": "model"}
    examples = (
        {"decoder_depth": 2},
        {"decoder_depth": 1, "target": "hog", "init": "mae"},
        {"decoder_depth": 1, "target": "words", "words": {"count": 5, "images": 4}},
    )

    mask_ratio: float = Field(
        default=0.75, gt=0, lt=1, description="share of the patches hidden from the encoder"
    )
    target: Literal["pixels", "hog", "words"] = Field(
        default="pixels", description="what of a hidden patch is reconstructed"
    )
    words: PatchWords = Field(default=PatchWords(), description="of target: words")
    normalise: bool = Field(
        default=True, description="pixels: give each patch mean 0 and variance 1"
    )
    decoder_depth: int = Field(default=8, ge=1, description="blocks of the decoder")
    decoder_dim: int | None = Field(
        default=None, ge=4, multiple_of=4, description="its width; two thirds of the model's"
    )
    init: Literal["model", "mae"] = Field(
        default="model",
        description="begin with the model's weights; or with MAE's, and with fixed positions",
    )
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _words_are_the_target(self) -> Self:
        if self.target != "words" and self.words != PatchWords():
            raise ValueError(
                f"'words' changes nothing with target: {self.target}; it is of target: words"
            )
        return self

    def install(self, model: nn.Module) -> Installed:
        """Put encoder hooks and decoder in. Raises BadInput for a model that needs all its
        patches."""
        structure = view(model, self.input_shape, probe=False)
        encoder = Encoder(model, structure)
        if not 1 <= int(encoder.patches * (1 - self.mask_ratio)) < encoder.patches:
            raise BadInput(
                f"mask_ratio {self.mask_ratio} of {encoder.patches} patches leaves none hidden or "
                "none visible: choose another"
            )
        if any(
            side % cells
            for side, cells in zip(structure.input_shape[1:], encoder.grid, strict=True)
        ):
            raise BadInput(
                f"images of {structure.input_shape[1:]} pixels do not divide into a grid of "
                f"{encoder.grid} patches"
            )
        width = self.words.count
        if self.target != "words":
            width = self.targets(structure.example, encoder.grid).shape[-1]
        parts = Parts(encoder, self.decoder_depth, self.decoder_dim, width).to(**encoder.kind)
        if self.init == "mae":
            begin_anew(model, encoder, structure, parts)
        model.get_submodule(encoder.blocks[-1]).add_module(_CHILD, parts)
        return InstalledMae(self, names_of(model, parts.parameters()), encoder, parts)

    def targets(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return what is to be reconstructed, or what it is said of in words.

        Args:
            images: (batch, channels, height, width).
            grid: (rows, columns) of patches.

        Returns:
            (batch, patches, features).
        """
        if "hog" in (self.target, self.target == "words" and self.words.of):
            return hog(images, grid)
        pixels = patchify(images, grid)
        return tec.normalise_channels(pixels) if self.normalise else pixels


class Parts(nn.Module):
    """Decoder and head."""

    def __init__(self, encoder: Encoder, depth: int, dim: int | None, width: int) -> None:
        super().__init__()
        dim, heads = tec.decoder_size(encoder.dim, dim)
        self.decoder = tec.Decoder(dim, depth, heads, encoder.grid, encoder.prefix)
        self.head = tec.FeatureHead(encoder.dim, dim, width)


class InstalledMae(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self, request: Mae, names: tuple[str, ...], encoder: Encoder, parts: Parts
    ) -> None:
        super().__init__(names)
        self.request, self.encoder, self.parts = request, encoder, parts
        self.codebook = Codebook(request.words, f"{request.words.of} of patches")
        if request.target == "words":
            self.wants = ("train",)

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"mae"}: the loss on the masked patches of images x (batch, channels, height,
        width)."""
        patches = self.encoder.patches
        noise = torch.rand(len(x), patches, device=x.device)
        ids_keep, restore, mask = tec.random_mask(
            noise, int(patches * (1 - self.request.mask_ratio))
        )
        encoded = self.encoder(x, ids_keep)[-1]
        decoded = self.parts.decoder(encoded, self.parts.head, restore)
        predicted = self.parts.head(decoded, self.encoder.prefix).float()
        target = self.request.targets(x.float(), self.encoder.grid)
        if self.request.target != "words":
            return {"mae": tec.feature_loss(predicted, target, mask)}
        if self.codebook.words is None:
            with self.phase("words"):
                images = self.request.words.images
                shown = self.feed("train", x.device, -(-images // len(x)))[:images].float()
                self.codebook.learn(
                    (self.request.targets(part, self.encoder.grid) for part in shown.split(256)),
                    self.seed,
                )
        words = self.codebook.probabilities(target, decoded[:, self.encoder.prefix :])
        return {"mae": words_loss(predicted, words, mask)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the words, once they are learned."""
        return self.codebook.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.codebook.load_state_dict(state)
