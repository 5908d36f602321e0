"""What a model's classifier is handed, from the forward of whoever calls the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from greenvis.errors import GreenvisError
from greenvis.techniques._shared.representation import Representation


class HeadInput:
    """Notes the features of each forward, with their gradient where there is one.

    Args:
        representation: Of the model.
    """

    def __init__(self, representation: Representation) -> None:
        self._noted: Tensor | None = None
        head = representation.model.get_submodule(representation.head)
        head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: Any) -> None:
        self._noted = args[0].flatten(1)

    def take(self, rows: int) -> Tensor:
        """Return the features of the last forward, (rows, dim), once.

        Raises:
            GreenvisError: Where there was none of so many images.
        """
        features, self._noted = self._noted, None
        if features is None or len(features) != rows:
            raise GreenvisError(
                f"the classifier was not handed the {rows} images of this batch in one forward: "
                "call the model on what batch(x, y) of the wrapped model returned"
            )
        return features
