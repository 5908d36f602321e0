"""What pretraining from a base adds to a model, and leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.techniques._shared import tec
from greenvis.techniques._shared.masked import Encoder
from greenvis.techniques.iteration.reuse._bases import Base


class Parts(nn.Module):
    """What pretraining adds and leaves behind: encoder adapters, the shared decoder, a head for
    each target of each base."""

    def __init__(self, request: Any, encoder: Encoder, bases: Sequence[Base]) -> None:
        super().__init__()
        dim, (width, heads) = encoder.dim, tec.decoder_size(encoder.dim, request.decoder_dim)
        self.adapters = (
            tec.EncoderAdapters(dim, len(encoder.blocks), request.encoder_adapters, 4 * width)
            if request.encoder_adapters
            else None
        )
        self.decoder = tec.Decoder(
            width, request.decoder_depth, heads, encoder.grid, encoder.prefix
        )
        self.heads = nn.ModuleList()
        for base in bases:
            base_heads = nn.ModuleDict()
            if "feature" in request.targets:
                base_heads["feature"] = tec.FeatureHead(dim, width, base.width)
            if "attention" in request.targets:
                base_heads["attention"] = tec.AttentionHead(
                    dim, width, base.heads * max(1, base.width // base.heads), base.heads
                )
            if "words" in request.targets:
                base_heads["words"] = tec.FeatureHead(dim, width, request.words.count)
            self.heads.append(base_heads)

    def encoded(self, outputs: list[Tensor]) -> Tensor:
        """Return the representation that the decoder reads, of the outputs of all blocks.

        Returns:
            (batch, prefix + visible, dim).
        """
        return outputs[-1] if self.adapters is None else self.adapters(torch.cat(outputs, -1))

    def predicted(
        self, base: int, target: str, encoded: Tensor, restore: Tensor, *more: Tensor
    ) -> Tensor:
        """Run the decoder for one target of one base."""
        head = self.heads[base].get_submodule(target)
        return head(self.decoder(encoded, head, restore), self.decoder.prefix, *more)
