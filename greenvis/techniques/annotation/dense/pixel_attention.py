"""Which places and channels of a frozen model's features tell images apart: what is in the
foreground."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from greenvis import models
from greenvis.core.surgery import freeze
from greenvis.core.technique import Installed
from greenvis.techniques.annotation.dense._maps import Maps
from greenvis.techniques.annotation.dense._pass import ATTACHED, Attention, Prototypes, projection
from greenvis.techniques.annotation.dense._swav import Assigns, InstalledAssigns


class PixelAttention(Assigns):
    """Learn, without labels, which pixels of a pretrained model's features say what an image shows
    (PASS: Gao et al., 2022).

    Saves masks: its attention parts foreground from background, and makes clustering cheap, for one
    vector an image is clustered, not each of its pixels. Costs two forwards of the frozen model
    per image, and next to no backward; the paper's 20 epochs are a tenth of the pretraining.
    Loses where the model was not pretrained for pixels, and where backgrounds tell images apart as
    well as objects do: data `scenes` beside `objects`. A pretext: labels are not used, and the
    model's own weights stay. Adds the term "pixel_attention": features weighed by place and
    channel, pooled, and assigned to prototypes. `merge` leaves the attention beside the model, in
    its file too, where `label_maps` reads it.

    Example:
        >>> live = gv.wrap(model, gv.PixelAttention(prototypes=8, dim=16))
        >>> sorted(live.terms(x, y, None))
        ['pixel_attention']
    """

    name = "pixel_attention"
    stage = "objective"
    examples = ({"prototypes": 6, "dim": 8, "queue": 5, "queue_epoch": 1, "frozen_epochs": 0},)

    def install(self, model: nn.Module) -> Installed:
        """Freeze the model, and put the attention beside its last block. Raises BadInput for a
        model without maps."""
        maps = Maps(model, self.input_shape)
        width = maps.widths[-1]
        parts = nn.ModuleDict(
            {
                "attention": Attention(width),
                "project": projection(width, 2 * width, self.dim),
                "prototypes": Prototypes(self.dim, self.prototypes),
            }
        )
        maps.add(self.name, parts)
        return InstalledPixelAttention(freeze(model, but=parts.parameters()), self, maps, parts)


class InstalledPixelAttention(InstalledAssigns[PixelAttention]):
    """Attention at work."""

    def __init__(
        self, names: tuple[str, ...], request: PixelAttention, maps: Maps, parts: nn.ModuleDict
    ) -> None:
        prototypes: Any = parts["prototypes"]
        super().__init__(names, request, maps, prototypes)
        self.freezes, self.parts = True, parts
        self._before = models.attached(maps.model, ATTACHED)

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"pixel_attention"}, of images x (batch, channels, height, width)."""
        views, _ = self.request.views(x)
        features = F.normalize(self.maps(views)[-1], dim=1)
        pooled = (self.parts["attention"](features) * features).mean((2, 3))
        loss, _ = self.assigned(self.parts["project"](pooled))
        return {"pixel_attention": loss}

    def merge(self) -> None:
        """Leave the attention beside the model."""
        models.attach(self.maps.model, ATTACHED, self.parts["attention"].state_dict())

    def undo(self) -> None:
        """Give the model the attention back that it had."""
        models.attach(self.maps.model, ATTACHED, self._before)
