"""What cheap pretexts train and herding compares: the vector that a model's classifier is handed,
from its own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import like


class Representation:
    """Gives what the classifier is handed, (batch, dim), with its gradient. head: the classifier's
    path; dim: the width.

    Raises BadInput for a model that shows no classifier.
    """

    def __init__(self, model: nn.Module, structure: View) -> None:
        if not structure.heads:
            raise BadInput(
                f"{type(model).__name__} shows no classifier, so nothing says which of its outputs "
                "is to be trained"
            )
        self.model, self.head = model, structure.heads[0]
        if structure.example.device.type == "meta":
            raise BadInput(
                f"{type(model).__name__} has no weights yet (device meta): load them first"
            )
        with probing(model), torch.no_grad():
            self.dim = self(structure.example).shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Return (batch, dim) of images x (batch, channels, height, width)."""
        inputs: list[Tensor] = []

        def note(module: nn.Module, args: Any) -> None:
            inputs.append(args[0])

        with self.model.get_submodule(self.head).register_forward_pre_hook(note):
            self.model(x)
        return inputs[0].flatten(1)

    def add(self, name: str, part: nn.Module) -> tuple[str, ...]:
        """Put a module that learns beside the classifier's own weights; return the names of its
        parameters in the model."""
        classifier = self.model.get_submodule(self.head)
        classifier.add_module(name, part.to(**like(classifier)))
        return names_of(self.model, part.parameters())
