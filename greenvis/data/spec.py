"""What a recipe's `data` says: which images, how many, and how they are shown. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from greenvis.core.technique import explain
from greenvis.errors import BadInput

Augment = Literal["none", "crop", "crop-flip", "randaug"]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class DataSpec(BaseModel):
    """Which images, how many, and how they are shown to the model.

    Raises:
        BadInput: For an unknown field, or a value out of range.

    Example:
        >>> DataSpec(name="digits", train=100).augment
        'none'
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=20_000
    )

    name: str = Field(
        description="digits, emoji:STYLE, fashion-mnist, folder:PATH, glyphs, hf-datasets:PATH, "
        "mnist-5k, scenes, shapes:LABELS, synthetic, torchvision:NAME, or a plug-in's"
    )
    train: Positive | None = Field(
        default=None, description="number of training images; all where absent"
    )
    test: Positive | None = Field(
        default=None, description="number of test images; all where absent"
    )
    held_out: Positive | None = Field(
        default=None,
        description="training images kept from all training, to choose on: thresholds, when to "
        "stop",
    )
    img_size: Annotated[int, Field(ge=4, le=16_384)] | None = Field(
        default=None, description="side in pixels; the data's own where absent"
    )
    in_chans: Literal[1, 3] | None = Field(
        default=None, description="channels; the data's own where absent"
    )
    augment: Augment = Field(
        default="none",
        description="augmentation, deterministic in (seed, epoch, image): pad by an eighth and "
        "crop back; the same, then flip half; RandAugment (Cubuk et al., 2020), then crop-flip",
    )
    views: Positive | None = Field(
        default=None,
        description="number of distinct augmented views of an image, so that a teacher's outputs "
        "can be cached; a new one each epoch where absent",
    )
    classes: tuple[str | int, ...] | None = Field(
        default=None, description="only these, by name or number; relabelled in order"
    )
    normalise: bool = Field(
        default=True,
        description="subtract the mean, divide by the deviation; else pixels are 0 to 1",
    )
    seed: Seed = Field(default=0, description="of subset and split")
    root: str | None = Field(
        default=None, description="folder of the data set's files, relative to the recipe"
    )
    download: bool = Field(default=False, description="fetch the files that are not on the disk")

    if not TYPE_CHECKING:  # a type checker sees the fields as the constructor's arguments

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise BadInput(explain(error, type(self), lambda *key: "data")) from error

    @model_validator(mode="after")
    def _views_count(self) -> Self:
        if self.views is not None and self.augment == "none":
            raise ValueError(
                "views changes nothing with augment: none, which has one; leave it out, or set "
                "augment"
            )
        return self
