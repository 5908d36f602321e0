"""Norm tuning: train only the normalisation layers and the classifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from greenvis.core.surgery import freeze, hold_norms, names_of
from greenvis.core.technique import Classifier, InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import reached, view
from greenvis.techniques._shared.heads import head_parameters


class NormTune(Technique):
    """Train only scale and shift of the normalisation layers, and the classifier (Frankle et al.,
    2021; Zhao et al., 2024).

    Saves optimizer memory and storage per task: of a large model under 1 % learns. Saves little
    training compute, as the backward still runs through the whole model; costs nothing at
    inference.

    Example:
        >>> live = gv.wrap(model, gv.NormTune(head="freeze"))
        >>> len(live.trainable)
        10
    """

    name = "norm_tune"
    stage = "weights"

    head: Classifier = "train"
    statistics: Literal["follow", "hold"] = Field(
        default="follow", description="of batch norms: follow the new images, or hold what they are"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze all but norms and classifier. Raises BadInput for a model without trainable
        norms."""
        structure = view(model, self.input_shape, probe=False)
        live = reached(model, structure.example)
        names = {n for n in live if n.rpartition(".")[0] in structure.role("norm")}
        if not names:
            raise BadInput(
                f"the norms of {type(model).__name__} have no scale or shift to train; use lora or "
                "bitfit"
            )
        if self.head == "train":
            names |= live & set(names_of(model, head_parameters(model, structure)))
        trained = [p for n, p in model.named_parameters() if n in names]
        follows = structure.in_classifier if self.head == "train" else lambda path: False
        freeze(model, but=trained, follows=follows)
        if self.statistics == "hold":
            hold_norms(model, but=lambda path, norm: follows(path))
        return Installed(names_of(model, trained), freezes=True)
