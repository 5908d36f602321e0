"""`train`, `stages` and `search`: how an arm trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from greenvis.core.validation import refuse_idle
from greenvis.data.spec import Seed
from greenvis.experiment.recipe._section import Name, Section

UNHASHED = {"seeds", "workers", "checkpoint_every_s"}  # settings of `train` that change no result


class TrainSpec(Section):
    """How an arm trains."""

    epochs: Annotated[int, Field(ge=0, le=10**6)] = 1
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 128
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None,
        description="blend each image with another: alpha of the shares' Beta distribution",
    )
    cutmix: Annotated[float, Field(gt=0, le=100)] | None = Field(
        default=None, description="paste a rectangle of another image into each: likewise"
    )
    precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: Annotated[int, Field(gt=0, le=10**6, description="batches an optimizer step")] = 1
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    threads: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        default=None, description="CPU threads of torch; its own choice where absent"
    )
    eval_every: Annotated[
        int, Field(ge=0, description="epochs between evaluations; 0: at the end only")
    ] = 1
    target: float | None = Field(
        default=None,
        description="of the task's primary metric: stop when it is reached on data.held_out, or on "
        "the test",
    )
    checkpoint_every_s: Annotated[
        float, Field(gt=0, description="seconds between checkpoints within an epoch")
    ] = 60.0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)

    def inputs(self) -> dict[str, Any]:
        """Return what of it changes results, under the names that runs are known by."""
        out = self.model_dump(exclude=UNHASHED)
        out["target_accuracy"] = out.pop("target")  # as it was called first
        for name in ("mixup", "cutmix"):  # which runs were known without
            if out[name] is None:
                del out[name]
        return out


class StageSpec(Section):
    """One stage of an arm's training: what differs from the arm's `train`, the techniques, and
    which layers learn."""

    name: Name | None = Field(None, description="stage1, … if absent")
    train: dict[str, Any] = Field(
        default={}, description="epochs, lr, …; the epochs are the stage's own"
    )
    techniques: tuple[str | dict[str, dict[str, Any] | None], ...] = ()
    layers: tuple[str, ...] = Field(
        default=(), description="roles (head, block, …) or patterns of module paths; all if absent"
    )
    on: Literal["unlabeled"] | None = Field(
        default=None,
        description="train on the images without a label, as a pretext does; on those with one if "
        "absent",
    )


class SearchSpec(Section):
    """Settings of the structure, as dilations, searched by short trainings that are judged on
    images held out, before the training proper; all of it is the arm's."""

    method: Literal["genetic", "random"] = Field(
        "genetic", description="made of the best so far (RF-Next, global); drawn"
    )
    trials: Annotated[int, Field(ge=1, le=10_000)] = 24
    epochs: Annotated[int, Field(ge=1, le=10**6, description="of each trial")] = 1
    population: Annotated[
        int, Field(ge=2, le=10_000, description="of genetic: drawn first; the best that are kept")
    ] = 8
    mutation: Annotated[
        float, Field(ge=0, le=1, description="of genetic: probability of each value to be drawn")
    ] = 0.2

    @model_validator(mode="after")
    def _none_is_idle(self) -> Self:
        return refuse_idle(
            self, dict.fromkeys(("population", "mutation"), ("method", ("genetic",)))
        )
