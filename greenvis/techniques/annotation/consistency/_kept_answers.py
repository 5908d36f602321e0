"""Which unlabelled images are easy, so that nothing is computed of them for some passes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_NONE = -1  # an image that was not answered surely, or not yet


class KeptAnswers:
    """The last sure answer to each image of a stream, and how long it is to be taken as it is.

    Args:
        passes: Over the stream from one look at an easy image to the next.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.classes = torch.full((0,), _NONE)
        self.rest = torch.zeros(0, dtype=torch.int64)  # draws that an image is still left out of

    def due(self, positions: Tensor) -> Tensor:
        """Return which of the images drawn are to be looked at, bool (n,); the others have rested
        once more.

        Args:
            positions: In the set, int64 (n,).
        """
        missing = int(positions.max()) + 1 - len(self.rest)
        if missing > 0:
            self.classes = torch.cat([self.classes, torch.full((missing,), _NONE)])
            self.rest = torch.cat([self.rest, torch.zeros(missing, dtype=torch.int64)])
        due = self.rest[positions] == 0
        self.rest[positions[~due]] -= 1
        return due

    def put(self, positions: Tensor, classes: Tensor, learned: Tensor) -> None:
        """Note the answers of a step.

        Args:
            positions: Of the images looked at, int64 (n,).
            classes: What was surely answered to their weak views, -1 where nothing was, int64 (n,).
            learned: Whose strong view was answered alike, bool (n,).
        """
        easy = learned & (classes != _NONE) & (classes == self.classes[positions])
        self.rest[positions] = torch.where(easy, self.passes - 1, 0)
        self.classes[positions] = classes

    def state_dict(self) -> dict[str, Tensor]:
        """Return the answers and rests by image."""
        return {"classes": self.classes.clone(), "rest": self.rest.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.classes, self.rest = (state[name].cpu().clone() for name in ("classes", "rest"))
