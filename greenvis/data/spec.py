"""What a recipe's `data` says: which images, how many, and how they are shown. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from greenvis.core.technique import explain
from greenvis.errors import BadInput

Augment = Literal[
    "none",
    "crop",
    "crop-flip",
    "color-jitter",
    "randaug",
    "trivialaugment",
    "augmix",
    "random-resized-crop",
]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
FOLDER = "folder:"  # before a path
Below = Annotated[str, Field(pattern=f"^{FOLDER}.")]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=20_000
    )


class PerClass(_Section):
    """So many labels of each class."""

    per_class: Positive


class NoiseSpec(_Section):
    """Training labels that are wrong on purpose; those held out and those of the test are right."""

    rate: Annotated[float, Field(gt=0, le=1, description="share of the labels that are wrong")]
    kind: Literal["symmetric", "asymmetric", "pairs", "candidates"] = Field(
        default="symmetric",
        description="any other class; the next one, for every second class alone; the next one; or "
        "none is wrong, but each other class stands beside it with this probability",
    )


Domains = tuple[Annotated[str, Field(min_length=1)], ...]


class DomainsSpec(_Section):
    """What domain the images of each role are of: one of the data set's own (a folder, a style), or
    a named change of it (plain, rotate, permute, noise, blur, contrast, brightness, invert,
    texture; "noise:0.3" says how much). Images of a role are dealt out to its domains."""

    train: Domains = ("plain",)
    unlabeled: Domains = Field(default=(), description="of `unlabeled`; as `train` where absent")
    target: Domains = Field(
        default=(), description="images without labels, of the domain to adapt to"
    )
    test: Annotated[
        Domains,
        Field(
            min_length=1,
            description='a test of each; the first is the primary one. "sorted:NAME": in the order '
            "of its classes",
        ),
    ] = ("plain",)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for role in ("train", "unlabeled", "target", "test"):
            names = getattr(self, role)
            if len(set(names)) < len(names):
                raise ValueError(f"domains.{role} names a domain twice; name each once")
        return self


class BagsSpec(_Section):
    """Images in bags, of which only the bag has a label: whether an image of these classes is in
    it."""

    size: Annotated[int, Field(ge=2, le=10_000, description="images of a bag, on average")] = 10
    positive: Annotated[
        tuple[str | int, ...], Field(min_length=1, description="classes, by name or number")
    ]


ROLES = ("labels", "unlabeled", "noise", "imbalance", "domains", "bags", "captions", "questions")


class DataSpec(_Section):
    """Which images, how many, and how they are shown to the model.

    Raises:
        BadInput: For an unknown field, or a value out of range.

    Example:
        >>> DataSpec(name="digits", train=100).augment
        'none'
    """

    name: str = Field(
        description="csv:PATH, digits, duets:TOPIC, emoji:STYLE, fashion-mnist, folder:PATH, "
        "glyphs, hf-datasets:PATH, mnist-5k, objects, scenes, shapes:LABELS, synthetic, "
        "torchvision:NAME, or a plug-in's"
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
        "crop back; the same, then flip half; other brightness, contrast, saturation and hue, "
        "RandAugment (Cubuk et al., 2020), TrivialAugment (Müller and Hutter, 2021) or AugMix "
        "(Hendrycks et al., 2020), then crop-flip; a window of 8 to 100 % of the image brought to "
        "size, then flip half. Masks and boxes follow crops",
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
    labels: (
        Annotated[int, Field(ge=0, le=10**9)]
        | Annotated[float, Field(gt=0, le=1)]
        | PerClass
        | None
    ) = Field(
        default=None,
        description="how many training images have a label: a number, a share, or {per_class: 4}; "
        "drawn by class and by the run's seed, a smaller budget within a larger; all where absent, "
        "0: none is known, for pretexts",
    )
    unlabeled: Literal["rest", "none"] | Positive | Below | None = Field(
        default=None,
        description="images without a label to learn from: all training images that remain, so "
        'many of them, or those below a folder ("folder:PATH", relative to the recipe)',
    )
    noise: NoiseSpec | None = Field(
        default=None, description="wrong training labels: a rate, or {rate, kind}"
    )
    imbalance: Annotated[float, Field(gt=1, le=10**6)] | None = Field(
        default=None,
        description="a long tail: the first class has so many times the images of the last",
    )
    domains: DomainsSpec | None = Field(default=None, description="domains of each role, by name")
    bags: BagsSpec | None = Field(default=None, description="images in bags with one label each")
    captions: str | None = Field(
        default=None,
        description='a text with each image, such as "a picture of {name}": its own name where '
        "the data has such, else that of its class",
    )
    questions: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None,
        description="so many questions about each image, answered by rule from its mask or class, "
        "for the task vqa",
    )
    skip_broken: bool = Field(
        default=False,
        description="leave out images that cannot be read and classes without images (the record "
        "names them), instead of refusing them all at once",
    )

    if not TYPE_CHECKING:  # a type checker sees the fields as the constructor's arguments

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise BadInput(explain(error, type(self), lambda *key: "data")) from error

    @field_validator("noise", mode="before")
    @classmethod
    def _rate_alone(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {"rate": value} if number else value

    @field_validator("captions")
    @classmethod
    def _caption_names(cls, value: str | None) -> str | None:
        if value is not None and (
            "{name}" not in value or set("{}") & set(value.replace("{name}", ""))
        ):
            raise ValueError('captions holds "{name}" and no other braces')
        return value

    @property
    def unlabeled_folder(self) -> str | None:
        """The path of the folder whose images `unlabeled` names; None where it names none."""
        named = isinstance(self.unlabeled, str) and self.unlabeled.startswith(FOLDER)
        return str(self.unlabeled).removeprefix(FOLDER) if named else None

    def roles(self) -> dict[str, Any]:
        """Return what is said of roles, as a recipe writes it; empty where nothing is."""
        return self.model_dump(mode="json", include=set(ROLES), exclude_none=True)

    def pool(self) -> Self:
        """Return what all arms and seeds have in common: the images before they get roles."""
        drawn = dict.fromkeys((*ROLES, "views"), None)
        drawn_from = self.unlabeled if self.unlabeled_folder else "rest"
        unlabeled = None if self.unlabeled in (None, "none") else drawn_from
        update = {**drawn, "domains": self.domains, "unlabeled": unlabeled, "augment": "none"}
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _views_count(self) -> Self:
        if self.bags is not None and self.captions is not None:
            raise ValueError(
                "a bag has a label and no text, and captions are of single images; leave one of "
                "them out"
            )
        beside = [r for r in ("bags", "captions", "noise") if getattr(self, r) is not None]
        if self.questions is not None and beside:
            raise ValueError(f"questions are of masks or classes, without {beside[0]}; leave one "
                             "of them out")  # fmt: skip
        if self.captions is not None and self.noise is not None:
            raise ValueError("noise is of classes, and captions have none; leave one of them out")
        if self.views is not None and self.augment == "none":
            raise ValueError(
                "views changes nothing with augment: none, which has one; leave it out, or set "
                "augment"
            )
        return self
