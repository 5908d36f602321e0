"""`data`: which images, how many, and how they are shown; or a stream of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from greenvis.data import spec as data
from greenvis.experiment.recipe._section import Section

# what an arm may say of `data`: what learning is paid with, and how images are shown to it
ARM_DATA = ("labels", "unlabeled", "noise", "imbalance", "augment", "views", "img_size")


class StreamSpec(Section):
    """The data as a stream of tasks, learned one after another."""

    kind: Literal["class", "domain", "task", "free"] = Field(
        default="class",
        description="new classes come; the same look different; new ones, and the test says whose; "
        "no borders",
    )
    tasks: Annotated[int, Field(ge=2, le=10_000)] = 5
    order: Literal["seed", "given"] = Field(
        default="seed", description="of classes or domains: drawn from the run's seed"
    )
    head: Literal["single", "growing", "multi"] | None = Field(
        default=None,
        description="who competes in training: all classes, those seen, the task's own; multi for "
        "task, else single",
    )
    domain: Literal["rotate", "permute"] = Field(
        default="rotate", description="what a domain stream does to its images"
    )
    blur: Annotated[
        float,
        Field(ge=0, le=10_000, description="of free: tasks an image may stand from its place"),
    ] = 0.5
    train_on: Literal["task", "seen", "all"] = Field(
        default="task",
        description="each task's images; all so far (cumulative); all tasks at once (joint)",
    )
    restart: bool = Field(default=False, description="begin each task from the first weights again")


class DataSpec(data.DataSpec):
    """Which images, how many, and how they are shown to the model; or a stream of them."""

    if not TYPE_CHECKING:
        __init__ = BaseModel.__init__  # what is wrong in a recipe is said of its lines

    stream: StreamSpec | None = Field(
        default=None, description="a stream of tasks; train.epochs are for each of them"
    )
