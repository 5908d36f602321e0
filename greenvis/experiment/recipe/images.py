"""`subset`, `synthesis` and `active` of an arm: images chosen, images made, labels bought."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from greenvis.core.validation import refuse_idle
from greenvis.data.spec import Positive
from greenvis.experiment.recipe._section import Section


class SubsetSpec(Section):
    """A few images per class in the place of the training set; what it takes to choose or make them
    is the arm's."""

    method: Literal["random", "herding", "condensed"] = Field(
        "random", description="drawn; chosen by their mean; made"
    )
    per_class: Positive = 10
    iterations: Annotated[
        int,
        Field(
            ge=1,
            le=10**6,
            description="of condensed: random networks whose mean embeddings are matched",
        ),
    ] = 300
    lr: Annotated[float, Field(gt=0, description="of condensed, on the pixels")] = 10.0
    batch: Annotated[
        int, Field(ge=1, le=10**6, description="of condensed: real images per class and iteration")
    ] = 32
    width: Annotated[
        int,
        Field(ge=1, le=4096, description="channels of the random networks (herding, condensed)"),
    ] = 32

    @model_validator(mode="after")
    def _none_is_idle(self) -> Self:
        made = ("method", ("condensed",))
        return refuse_idle(
            self,
            {
                **dict.fromkeys(("iterations", "lr", "batch"), made),
                "width": ("method", ("herding", "condensed")),
            },
        )


class SynthesisSpec(Section):
    """Images made for scarce classes, beside the real ones; what it takes to make them is the
    arm's."""

    by: Literal["oversample", "cvae", "layout", "gan", "diffusion"] = Field(
        "oversample",
        description="real images shown again, the baseline of all others; drawn by a conditional "
        "variational autoencoder; objects of real images pasted on others, with masks or boxes; "
        "drawn by an adversarial network with differentiable augmentation, or by a diffusion model "
        "with guidance",
    )
    per_class: Positive | None = Field(
        None, description="images each class is brought to; as the largest where absent"
    )
    layout: str | None = Field(
        None,
        description="JSON file of what stands where, a list of images, each a list of "
        '{"class": "cat", "box": [x0, y0, x1, y1]} in shares of the side; one object of a scarce '
        "class per image, at random, where absent",
    )
    epochs: Annotated[int, Field(ge=1, le=10**6, description="of what draws images")] = 50
    batch_size: Annotated[int, Field(ge=1, le=10**6, description="likewise")] = 64
    lr: Annotated[float, Field(gt=0, description="likewise")] = 1e-3

    @model_validator(mode="after")
    def _none_is_idle(self) -> Self:
        if self.layout is not None and self.per_class is not None:
            raise ValueError("a layout file says how many images are made; leave per_class out")
        learned = ("by", ("cvae", "gan", "diffusion"))
        drawn = dict.fromkeys(("epochs", "batch_size", "lr"), learned)
        return refuse_idle(self, {**drawn, "layout": ("by", ("layout",))})


class ActiveSpec(Section):
    """Labels bought in rounds, of images that a query chooses; the model is trained after each, and
    all of it is the arm's. The labels of images that were not bought are never looked at."""

    query: Literal["random", "entropy", "margin", "kcenter", "badge", "typiclust"] = Field(
        "random",
        description="drawn; most uncertain (entropy, margin); farthest from those labelled "
        "(kcenter); k-means++ on gradients (badge); the most typical of clusters (typiclust)",
    )
    start: Positive = Field(
        20, description="labels of the first round: drawn, or chosen where `features` are there"
    )
    step: Positive = Field(20, description="labels of each further round")
    rounds: Annotated[int, Field(ge=1, le=10_000, description="with the first")] = 4
    retrain: Literal["scratch", "warm"] = Field(
        "scratch", description="each round begins with the first weights, or where the last ended"
    )
    features: str | None = Field(
        None,
        pattern="^run:",
        description="run:NAME, whose model gives the features of kcenter and typiclust; the arm's "
        "own where absent",
    )

    def counts(self) -> list[int]:
        """Return how many labels there are after each round."""
        return [self.start + self.step * i for i in range(self.rounds)]

    @model_validator(mode="after")
    def _none_is_idle(self) -> Self:
        if self.rounds == 1 and self.model_fields_set & {"step", "retrain"}:
            raise ValueError("step and retrain are of further rounds, and rounds is 1")
        return refuse_idle(self, {"features": ("query", ("kcenter", "typiclust"))})
