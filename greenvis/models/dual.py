"""An encoder of images and one of texts that meet in one space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DualEncoder(nn.Module):
    """A dual encoder of transformers, called with images and tokens.

    Args:
        model: Such as CLIPModel.
        length: The most tokens of a text.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length

    @property
    def img_size(self) -> int | None:
        """Side of the images in pixels, where the model says it."""
        return getattr(getattr(self.model.config, "vision_config", None), "image_size", None)

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> Any:
        """Return logits_per_image, image_embeds and text_embeds.

        Args:
            images: (batch, channels, height, width).
            tokens: int64 (batch, length), 0 where a text is over; None: texts of a word, such as
                to look at the model's parts.
        """
        if tokens is None:
            tokens = torch.ones(len(images), 1, dtype=torch.int64, device=images.device)
        tokens = tokens[:, : self.length]
        return self.model(
            pixel_values=images, input_ids=tokens, attention_mask=(tokens != 0).long()
        )


def clip_of(
    in_chans: int, img_size: int, patch_size: int, width: int, depth: int, heads: int,
    tokens: int, length: int,
) -> DualEncoder:  # fmt: skip
    """Return a CLIP with random weights; see `plain.clip`."""
    from transformers import CLIPConfig, CLIPModel

    both = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "projection_dim": width,
    }
    text = {
        **both,
        "vocab_size": tokens,
        "max_position_embeddings": length,
        "pad_token_id": 0,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
    }
    vision = {
        **both, "image_size": img_size, "patch_size": patch_size, "num_channels": in_chans
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    return DualEncoder(CLIPModel(config), length)
