"""GDumb: while tasks go by nothing learns; at each task's end a model is trained from the start on
what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from greenvis.core.attached import below, prefixed
from greenvis.core.modes import in_mode
from greenvis.core.technique import Installed, logits_of
from greenvis.tasks.answers import require_class_numbers
from greenvis.techniques.iteration.continual._buffer import Buffer

BATCH_SIZE = 16


class InstalledGdumb(Installed):
    """The buffer fills while the loop goes through a task; its own steps change nothing. Adds the
    term "gdumb", which is 0."""

    pretext = True

    def __init__(
        self,
        model: nn.Module,
        buffer: Buffer,
        epochs: int,
        lr: float,
        batch_size: int | None,
        instead: str,
    ) -> None:
        super().__init__()
        self.model, self.buffer, self.epochs, self.lr = model, buffer, epochs, lr
        self.batch_size = batch_size or BATCH_SIZE
        self._instead = instead
        self.start = {
            n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]
        }

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Offer the images to the buffer."""
        require_class_numbers(y, "gdumb", self._instead)
        self.buffer.offer(x, y)
        return x, y

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"gdumb": 0}, with a gradient of 0 for all that learns."""
        learning = [p for p in self.model.parameters() if p.requires_grad]
        return {"gdumb": torch.stack([0.0 * p.sum() for p in learning]).sum()}

    def end_experience(self, loader: Any) -> None:
        """Train from the first weights on the buffer: SGD, learning rate down a cosine, in the
        phase "gdumb"."""
        self._restart()
        learning = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=self.lr, momentum=0.9, weight_decay=1e-6)
        schedule = CosineAnnealingLR(optimizer, self.epochs, eta_min=self.lr / 100)
        device = next(self.model.parameters()).device
        with self.phase("gdumb"), in_mode(self.model, True):
            for _ in range(self.epochs):
                shuffled = self.buffer.draw(len(self.buffer))
                for start in range(0, len(shuffled), self.batch_size):
                    rows = shuffled[start : start + self.batch_size]
                    if len(rows) == 1 and len(self.buffer) > 1:
                        continue  # a batch norm has nothing to say of one image
                    x, y = self.buffer.take(rows, device)
                    optimizer.zero_grad()
                    F.cross_entropy(logits_of(self.model(x)), y).backward()
                    torch.nn.utils.clip_grad_norm_(learning, 10.0)
                    optimizer.step()
                schedule.step()
        optimizer.zero_grad()

    def _restart(self) -> None:
        with torch.no_grad():
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if name in self.start:
                    tensor.copy_(self.start[name])

    def facts(self) -> Mapping[str, Any]:
        """Return what the buffer holds and takes."""
        return self.buffer.facts()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffer; the first weights are those the model is built with."""
        return prefixed("buffer.", self.buffer.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffer back."""
        self.buffer.load_state_dict(below(state, "buffer."))
