"""BitFit: train only the biases and the classifier."""

from __future__ import annotations

from torch import nn

from greenvis.core.surgery import freeze, hold_norms, names_of
from greenvis.core.technique import Classifier, InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import reached, view
from greenvis.techniques._shared.heads import head_parameters


class Bitfit(Technique):
    """Train only bias terms and the classifier (Ben Zaken et al., 2022).

    Saves optimizer memory and storage per task: of a large model under 1 % learns. Saves little
    training compute, as the backward still runs through the whole model; costs nothing at
    inference. Batch norms keep the statistics they have.

    Example:
        >>> live = gv.wrap(model, gv.Bitfit())
        >>> sorted(live.trainable)[:2]
        ['blocks.0.attn.proj.bias', 'blocks.0.attn.qkv.bias']
    """

    name = "bitfit"
    stage = "weights"

    head: Classifier = "train"
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze all but biases and classifier. Raises BadInput for a model without biases."""
        structure = view(model, self.input_shape, probe=False)
        live = reached(model, structure.example)
        names = {n for n in live if n.rpartition(".")[2].endswith("bias")}
        if not names:
            raise BadInput(
                f"{type(model).__name__} has no bias that reaches its output; use lora or norm_tune"
            )
        if self.head == "train":
            names |= live & set(names_of(model, head_parameters(model, structure)))
        trained = [p for n, p in model.named_parameters() if n in names]
        follows = structure.in_classifier if self.head == "train" else lambda path: False
        freeze(model, but=trained, follows=follows)
        hold_norms(model, but=lambda path, norm: follows(path))
        return Installed(names_of(model, trained), freezes=True)
