"""Pretraining for pixels: what is at a place of an image is to be the same whatever view shows
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.core.technique import Installed
from greenvis.errors import BadInput
from greenvis.techniques.annotation.dense._maps import Maps
from greenvis.techniques.annotation.dense._pass import (
    Prototypes,
    at_places,
    overlap_grids,
    pixel_loss,
    pixel_mlp,
    projection,
    swapped_loss,
)
from greenvis.techniques.annotation.dense._swav import Assigns, InstalledAssigns


class PassPretrain(Assigns):
    """Pretrain a model for segmentation without masks: two views of an image share a prototype, and
    the places that both show share their features (PASS: Gao et al., 2022; SwAV: Caron et al.,
    2020).

    Saves masks, not energy: a step costs about twice a supervised one (two views). Loses where the
    last features have few places: with 2 × 2 of them there is nothing to align (ask for a smaller
    stride, or larger images). A pretext: labels are not used, and what stands behind the last block
    stays untrained. Adds the terms "pass_images" (each view's pooled features foretell the
    prototypes of the other), "pass_pixels" (a grid over the overlap of both views, turned views
    turned back; the other view's features are foretold from one's) and "pass_shallow" (an earlier
    block's features foretell the last block's prototypes of the other view). `merge` drops all that
    is added. `pixel_attention` is the second stage, `label_maps` the third.

    Example:
        >>> live = gv.wrap(model, gv.PassPretrain(prototypes=8, dim=16))
        >>> sorted(live.terms(x, y, None))
        ['pass_images', 'pass_pixels', 'pass_shallow']
    """

    name = "pass_pretrain"
    stage = "objective"
    needs = frozenset({"trainable_base"})
    examples = ({"prototypes": 6, "dim": 8, "queue": 5, "queue_epoch": 1, "frozen_epochs": 0},)

    places: int = Field(default=7, ge=1, description="to a side of the grid over an overlap")
    pixels: float = Field(default=1.0, ge=0, description="factor of the term of pixels")
    shallow: float = Field(
        default=1.0, ge=0, description="factor of the earlier block's term; 0: it is not looked at"
    )

    def install(self, model: nn.Module) -> Installed:
        """Put projections and prototypes beside the last block. Raises BadInput for a model without
        maps."""
        maps = Maps(model, self.input_shape)
        if self.shallow and len(maps.widths) < 2:
            raise BadInput(
                f"{type(model).__name__} shows one block, and none before it: set shallow: 0"
            )
        parts = Parts(self, maps.widths)
        maps.add(self.name, parts)
        return InstalledPass(names_of(model, parts.parameters()), self, maps, parts)


class Parts(nn.Module):
    """Projections of pixels and of images, predictor, prototypes."""

    def __init__(self, request: PassPretrain, widths: list[int]) -> None:
        super().__init__()
        dim, last = request.dim, widths[-1]
        hidden = 2 * last
        self.project = projection(last, hidden, dim)
        self.prototypes = Prototypes(dim, request.prototypes)
        self.pixel = self.predict = self.shallow_pixel = self.shallow_project = None
        if request.pixels:
            self.pixel = pixel_mlp(last, hidden, dim)
            self.predict = nn.Sequential(
                nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
                nn.Conv2d(dim, dim, 1),
            )  # fmt: skip
        if request.shallow:
            self.shallow_pixel = pixel_mlp(widths[0], hidden, widths[0])
            self.shallow_project = projection(widths[0], hidden, dim)


class InstalledPass(InstalledAssigns[PassPretrain]):
    """Pretraining at work."""

    def __init__(
        self, names: tuple[str, ...], request: PassPretrain, maps: Maps, parts: Parts
    ) -> None:
        super().__init__(names, request, maps, parts.prototypes)
        self.parts = parts

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return "pass_images", "pass_pixels" and "pass_shallow", those asked for, of images x
        (batch, channels, height, width)."""
        request, parts = self.request, self.parts
        views, where = request.views(x)
        *earlier, last = self.maps(views)
        vectors = parts.project(last.mean((2, 3)))
        loss, codes = self.assigned(vectors)
        terms = {"pass_images": loss}
        if parts.pixel is not None and parts.predict is not None:
            grids = overlap_grids(where[0], where[1], request.places)
            embedding = at_places(parts.pixel(last), grids.flatten(0, 1))
            predicted = parts.predict(embedding)
            ours, theirs = (m.float().unflatten(0, (2, -1)) for m in (predicted, embedding))
            terms["pass_pixels"] = request.pixels * pixel_loss(ours, theirs)
        if parts.shallow_pixel is not None and parts.shallow_project is not None:
            pooled = parts.shallow_pixel(earlier[0]).mean((2, 3))
            scores = parts.prototypes(parts.shallow_project(pooled), learn=False)
            shallow = swapped_loss(scores.float().unflatten(0, (2, -1)), codes, request.temperature)
            terms["pass_shallow"] = request.shallow * shallow
        return terms
