"""`layers:` of an arm or a stage: the layers that train, all others frozen."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from greenvis.core import surgery
from greenvis.core.technique import Installed, Stage, Technique
from greenvis.models.structure import ROLES, view


class Layers(Technique):
    """Train only the layers named, and freeze the others with their batch norms: what `layers:` of
    a stage means."""

    name: ClassVar[str] = "layers"
    stage: ClassVar[Stage] = "base"

    of: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="roles (head, block, …) or patterns of module paths"),
    ]

    def install(self, model: nn.Module) -> Installed:
        """Freeze the others. Raises BadInput for a pattern that matches nothing, with what the
        model has."""
        paths: set[str] = set()
        for one in self.of:
            matching = (
                view(model, probe=False).role(one)
                if one in ROLES
                else surgery.find(model, [one], nn.Module)
            )
            paths |= set(matching)
        learned = [p for path in paths for p in model.get_submodule(path).parameters()]
        return Installed(surgery.freeze(model, but=learned), freezes=True)
