"""What both stages of PASS have in common: views of images whose place is known, and SwAV's
assignment to prototypes with a queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from greenvis.core.technique import Installed
from greenvis.techniques._shared.views import RandomViews, random_maps, recoloured, through
from greenvis.techniques.annotation.dense._maps import Maps
from greenvis.techniques.annotation.dense._pass import Prototypes, sinkhorn, swapped_loss


class Assigns(RandomViews):
    """A pretext that assigns two views of each image to prototypes."""

    rank_local = True  # the queue

    prototypes: int = Field(default=64, ge=2, description="that images are assigned to")
    dim: int = Field(default=128, ge=2, description="width of the projection")
    temperature: float = Field(default=0.1, gt=0, description="divides the cosines")
    epsilon: float = Field(default=0.05, gt=0, description="of the assignment; smaller is harder")
    turns: int = Field(default=3, ge=1, description="of Sinkhorn's balance")
    queue: int = Field(
        default=2048,
        ge=0,
        description="earlier images that are assigned together with a batch; fewer than an epoch "
        "has, for of an older model they mislead",
    )
    queue_epoch: int = Field(default=15, ge=0, description="epochs before the queue counts")
    frozen_epochs: int = Field(
        default=1, ge=0, description="epochs in which the prototypes do not learn"
    )

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two views of images x, (2 · batch, channels, height, width), and where they lie,
        (2, batch, 2, 3)."""
        maps = [random_maps(len(x), self.area, self.flip, x.device) for _ in range(2)]
        shown = recoloured(torch.cat([through(x, m) for m in maps]), self.colour)
        return shown.to(x.dtype), torch.stack(maps)


Request = TypeVar("Request", bound=Assigns)


class InstalledAssigns(Installed, Generic[Request]):
    """Assignment at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self, names: tuple[str, ...], request: Request, maps: Maps, prototypes: Prototypes
    ) -> None:
        super().__init__(names)
        self.request, self.maps, self.prototypes = request, maps, prototypes
        device = prototypes.weight.device
        self._state = {
            "queue": torch.zeros(2, request.queue, request.dim, device=device),
            "queued": torch.zeros((), dtype=torch.int64),
            "epochs": torch.zeros((), dtype=torch.int64),
        }

    def assigned(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return SwAV's loss of vectors (2 · batch, dim), and each view's codes, (2, batch,
        prototypes)."""
        request, state = self.request, self._state
        self.prototypes.learns = int(state["epochs"]) >= request.frozen_epochs
        scores = self.prototypes(vectors).float().unflatten(0, (2, -1))
        earlier = torch.zeros(2, 0, scores.shape[2], device=scores.device)
        count = int(state["queued"])
        if count and int(state["epochs"]) >= request.queue_epoch:
            with torch.no_grad():
                known = state["queue"][:, :count].to(scores.device)
                flat = self.prototypes(known.flatten(0, 1).to(vectors.dtype))
                earlier = flat.float().unflatten(0, (2, -1))
        codes = torch.stack(
            [
                sinkhorn(torch.cat([own, before]), request.epsilon, request.turns)[: len(own)]
                for own, before in zip(scores, earlier, strict=True)
            ]
        )
        if request.queue and not self.repeated:
            new = vectors.detach().float().unflatten(0, (2, -1))[:, : request.queue]
            queue = torch.cat([new, state["queue"].to(new.device)], 1)[:, : request.queue]
            state["queue"] = queue
            state["queued"] = state["queued"].new_tensor(min(request.queue, count + new.shape[1]))
        return swapped_loss(scores, codes, request.temperature), codes

    def epoch_end(self) -> None:
        """Count the epoch."""
        self._state["epochs"] = self._state["epochs"] + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the queue, and the epochs trained."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self._state = {name: state[name].clone() for name in self._state}
