"""A small vision–language model of transformers, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from greenvis.models.completion import Completed, image_and_text


def llava_of(
    vision: Mapping[str, Any], text: Mapping[str, Any], heads: int, tokens: int, length: int
) -> nn.Module:
    """Return a Llava with random weights; see `plain.llava`.

    Args:
        vision: Fields of its CLIPVisionConfig.
        text: Of its LlamaConfig.
        heads: Of the attention of both.
        tokens: Size of the vocabulary, without the number that stands for a patch.
        length: The most tokens of a text.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    parts: list[dict[str, Any]] = [
        {**part, "num_attention_heads": heads, "intermediate_size": 4 * part["hidden_size"]}
        for part in (vision, text)
    ]
    ends: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**parts[0]),
        text_config=LlamaConfig(
            **parts[1],
            **ends,
            num_key_value_heads=heads,
            vocab_size=tokens + 1,
            max_position_embeddings=max(patches + length, 4096),
            tie_word_embeddings=False,
        ),
        image_token_index=tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **ends,
    )
    model = LlavaForConditionalGeneration(config)
    model.register_forward_pre_hook(Completed(image_and_text), with_kwargs=True)
    return model
