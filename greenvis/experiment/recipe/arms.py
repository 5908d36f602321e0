"""`arms`: what a recipe says of each, and an arm with everything filled in."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from greenvis.core.technique import Technique
from greenvis.experiment.recipe._section import Section
from greenvis.experiment.recipe.data import ARM_DATA, DataSpec, StreamSpec
from greenvis.experiment.recipe.images import ActiveSpec, SubsetSpec, SynthesisSpec
from greenvis.experiment.recipe.model import ModelSpec, ServeSpec
from greenvis.experiment.recipe.train import SearchSpec, StageSpec, TrainSpec
from greenvis.tasks.base import Task


class ArmSpec(Section):
    """One contender: what differs from the recipe's `model` (or a whole model of another `ref`) and
    `train`; techniques."""

    model_config = ConfigDict(protected_namespaces=())

    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    techniques: tuple[str | dict[str, dict[str, Any] | None], ...] = ()
    stream: dict[str, Any] = Field(
        default={}, description="what differs from the recipe's `data.stream`"
    )
    stages: tuple[StageSpec, ...] = Field(
        default=(), description="train in stages, one after another, on one model"
    )
    subset: SubsetSpec | None = Field(
        default=None, description="train on a few images per class only"
    )
    synthesis: SynthesisSpec | None = Field(
        default=None, description="make images for scarce classes"
    )
    active: ActiveSpec | None = Field(
        default=None, description="buy labels in rounds, of images that a query chooses"
    )
    search: SearchSpec | None = Field(
        default=None, description="search settings of the structure before the training"
    )
    serve: ServeSpec | None = Field(
        default=None, description="in the place of the recipe's `serve`"
    )
    data: dict[str, Any] = Field(
        default={},
        description=f"what differs from the recipe's `data`: {', '.join(ARM_DATA)}; never the test",
    )


class Arm(BaseModel):
    """An arm with everything filled in."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    name: str
    data: DataSpec
    model: ModelSpec
    task: Task
    train: TrainSpec
    techniques: tuple[Technique, ...]
    stream: StreamSpec | None = None
    subset: SubsetSpec | None = None
    synthesis: SynthesisSpec | None = None
    active: ActiveSpec | None = None
    search: SearchSpec | None = None
    serve: ServeSpec | None = None
    stage: str = ""
    layers: tuple[str, ...] = ()
    on: str = ""
    stages: tuple[Arm, ...] = ()

    @property
    def test_batch(self) -> int:
        """Images of a test's batch."""
        return max(self.train.batch_size, 256) if self.serve is None else self.serve.batch_size

    def needs(self) -> list[str]:
        """Return the references to other runs ("run:NAME") this arm builds on."""
        own = [ref for ref in self.model.starts if ref.startswith("run:")]
        techniques = [*self.techniques, *(t for stage in self.stages for t in stage.techniques)]
        if self.active is not None and self.active.features is not None:
            own.append(self.active.features)
        return own + [ref for t in techniques for ref in t.runs().values()]
