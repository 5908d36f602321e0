"""An encoder of images and one of texts that meet in one space."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.weights import first_line
from greenvis.errors import BadInput
from greenvis.models.heads import looked_at
from greenvis.tasks.answers import logits_of


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


class TwoTowers(nn.Module):
    """An encoder of images and one of texts, each followed by a linear layer into one space.

    Args:
        image: Of images, to embeddings (batch, `image_width`).
        image_width: Of what it gives.
        text: Of tokens, a model of transformers whose output has `last_hidden_state`.
        text_width: Of that.
        dim: Of the space.
        length: The most tokens of a text.
    """

    def __init__(
        self,
        image: nn.Module,
        image_width: int,
        text: nn.Module,
        text_width: int,
        dim: int,
        length: int,
    ) -> None:
        super().__init__()
        self.image, self.text, self.length = image, text, length
        self.project_image = nn.Linear(image_width, dim, bias=False)
        self.project_text = nn.Linear(text_width, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Return logits_per_image, image_embeds and text_embeds.

        Args:
            images: (batch, channels, height, width).
            tokens: int64 (batch, length), 0 where a text is over; None: texts of a word, such as
                to look at the model's parts.
        """
        if tokens is None:
            tokens = torch.ones(len(images), 1, dtype=torch.int64, device=images.device)
        tokens = tokens[:, : self.length]
        mask = (tokens != 0).long()
        mask[:, 0] = 1  # a text of no words is one of a word
        states = self.text(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        image = F.normalize(self.project_image(logits_of(self.image(images))), dim=1)
        text = F.normalize(self.project_text(mean), dim=1)
        logits = self.logit_scale.exp() * image @ text.T
        return {"logits_per_image": logits, "image_embeds": image, "text_embeds": text}


def with_text(
    model: nn.Module,
    size: Any = None,
    text: str = "bert",
    text_dim: int = 64,
    text_depth: int = 2,
    tokens: int = 256,
    length: int = 77,
) -> TwoTowers:
    """Give a classifier of images an encoder of texts beside it, in place of its classes.

    Args:
        model: A backbone with its classifier, which leaves it.
        size: The images' side, or (height, width), in pixels, where the model does not say.
        text: A kind of model of transformers ("bert", "distilbert", "clip_text_model", …), begun
            with random weights.
        text_dim: Its width, and that of the space both meet in.
        text_depth: Its blocks.
        tokens: Size of the vocabulary; 0 pads.
        length: The most tokens of a text.

    Raises:
        BadInput: For a backbone that shows no single classifier, and a kind that is none, or does
            not take such sizes.
    """
    structure = looked_at(model, "text", size)
    if len(structure.heads) != 1:
        raise BadInput(
            f"`head: text` wants a backbone with one classifier, and this {type(model).__name__} "
            f"has {len(structure.heads)}"
        )
    encoder = _text_model(text, text_dim, text_depth, tokens, length)
    model.set_submodule(structure.heads[0], nn.Identity())
    mode = model.training
    with torch.no_grad():
        width = logits_of(model.eval()(structure.example)).shape[1]
    return TwoTowers(model.train(mode), width, encoder, text_dim, text_dim, length)


def _text_model(kind: str, dim: int, depth: int, tokens: int, length: int) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    sizes = {
        "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": max(1, dim // 32),
        "intermediate_size": 4 * dim, "vocab_size": tokens, "max_position_embeddings": length + 2,
        "pad_token_id": 0, "bos_token_id": tokens - 2, "eos_token_id": tokens - 1,
    }  # fmt: skip
    try:
        model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
        out = model(
            input_ids=torch.ones(1, 2, dtype=torch.int64),
            attention_mask=torch.ones(1, 2, dtype=torch.int64),
        )
        fits = out.last_hidden_state.shape == (1, 2, dim)
    except Exception as error:  # each kind has its own way to refuse a size
        raise BadInput(
            f"text: '{kind}' makes no encoder of texts: {first_line(error)}; take bert"
        ) from error
    if not fits:
        raise BadInput(f"text: '{kind}' does not take text_dim {dim}: take bert")
    return model
