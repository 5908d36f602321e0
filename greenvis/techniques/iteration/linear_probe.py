"""Linear probing: train the classifier on the features of a frozen model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from greenvis.surgery import freeze
from greenvis.technique import Installed, Stage, Technique
from greenvis.views import view


class LinearProbe(Technique):
    """Train only the classifier; all below is frozen, its batch norms held (the baseline any adaptation must beat).

    Saves the whole backward but the head's, and all optimizer memory but the head's. Costs accuracy where the features do
    not fit the task. Dropout and stochastic depth of the frozen part stay as `model.train()` sets them.
    """

    name: ClassVar[str] = "linear_probe"
    stage: ClassVar[Stage] = "weights"

    input_shape: Annotated[
        tuple[int, int, int] | None, Field(description="(channels, height, width) of an image, if it cannot be inferred")
    ] = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze all but the classifier. Raises BadInput for a model without one."""
        found = view(model, self.input_shape, probe=False)
        learned = {id(p) for path in found.role("head") for p in model.get_submodule(path).parameters()}
        freeze(model, but=[p for p in model.parameters() if id(p) in learned])
        return Installed(tuple(n for n, p in model.named_parameters() if id(p) in learned), freezes=True)
