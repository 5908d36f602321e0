"""`model` and `serve`: which network, and how a finished one is served."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from greenvis.experiment.recipe._section import Section


class ModelSpec(Section):
    """A model by reference; further keys are options of the model (img_size, num_classes,
    memory_format, …)."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    ref: str = Field(
        description="timm/NAME, torchvision/NAME, hf/NAME_OR_PATH, transformers/CLASS_OR_PATH, "
        "diffusers/CLASS_OR_PATH, plain/mlp, plain/convnet, module:function or file:PATH"
    )
    init: str | None = Field(None, description="weights to start from, run:NAME or file:PATH")
    average: Annotated[tuple[str, ...], Field(max_length=100)] = Field(
        (),
        description="weights to start from the mean of, run:NAME or file:PATH each, of one "
        "structure",
    )
    average_norms: Literal["mean", "estimate"] = Field(
        "mean",
        description="of `average`: batch norms get the mean of the statistics too (as ReVT does), "
        "or those of the training images",
    )
    classifier: Literal["new", "keep"] = Field(
        "new", description="begin with a new classifier, or with that of `init` or `average`"
    )
    fold_norms: bool = Field(
        False,
        description="measure it with its batch norms folded into the convolutions before them",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options given beside the reference."""
        return dict(self.model_extra or {})

    @property
    def starts(self) -> tuple[str, ...]:
        """What it begins with, "run:NAME" or "file:PATH" each."""
        return self.average if self.init is None else (self.init,)

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.average and self.init is not None:
            raise ValueError("it starts from `init` or from an `average`, not from both")
        if len(self.average) == 1:
            raise ValueError("an average is of two or more; `init` starts from one")
        for ref in self.average:
            if not ref.startswith(("run:", "file:")):
                raise ValueError(f"'{ref}' is neither run:NAME nor file:PATH")
        return self


class ServeSpec(Section):
    """How a finished model is served, which counts for what adapts as it answers."""

    batch_size: Annotated[
        int, Field(gt=0, le=10**6, description="images at once: in each test, and when measured")
    ] = 64
