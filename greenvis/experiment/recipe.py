"""YAML -> validated recipe. Every error names file:line and the nearest valid name; nothing here
imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from greenvis.core import yamlfile
from greenvis.core.technique import Technique
from greenvis.core.validation import explain, format_value, refuse_idle
from greenvis.core.yamlfile import Key
from greenvis.data import spec as data
from greenvis.data.spec import Positive, Seed
from greenvis.errors import BadInput, nearest
from greenvis.experiment import recipe_checks
from greenvis.experiment.frontier import FrontierSpec, ladder
from greenvis.tasks import registry as task_registry
from greenvis.tasks.base import Task
from greenvis.techniques import registry

Where = Callable[..., str]  # key path -> "file:line"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
# what an arm may say of `data`: what learning is paid with, and how images are shown to it
ARM_DATA = ("labels", "unlabeled", "noise", "imbalance", "augment", "views", "img_size")
UNHASHED = {"seeds", "workers", "checkpoint_every_s"}  # settings of `train` that change no result


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=20_000
    )


class StreamSpec(_Section):
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


class ModelSpec(_Section):
    """A model by reference; further keys are options of the model (img_size, num_classes,
    memory_format, …)."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    ref: str = Field(
        description="timm/NAME, torchvision/NAME, hf/NAME_OR_PATH, transformers/CLASS_OR_PATH, "
        "diffusers/CLASS_OR_PATH, plain/mlp, module:function or file:PATH"
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


class TrainSpec(_Section):
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


class StageSpec(_Section):
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


class SubsetSpec(_Section):
    """A few images a class in the place of the training set; what it takes to choose or make them
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
        int, Field(ge=1, le=10**6, description="of condensed: real images a class and iteration")
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


class SynthesisSpec(_Section):
    """Images made for scarce classes, beside the real ones; what it takes to make them is the
    arm's."""

    by: Literal["oversample", "cvae", "layout"] = Field(
        "oversample",
        description="real images shown again, the baseline of all others; drawn by a conditional "
        "variational autoencoder; objects of real images pasted on others, with masks or boxes",
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
        drawn = dict.fromkeys(("epochs", "batch_size", "lr"), ("by", ("cvae",)))
        return refuse_idle(self, {**drawn, "layout": ("by", ("layout",))})


class ActiveSpec(_Section):
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


class ServeSpec(_Section):
    """How a finished model is served, which counts for what adapts as it answers."""

    batch_size: Annotated[
        int, Field(gt=0, le=10**6, description="images at once: in each test, and when measured")
    ] = 64


class ArmSpec(_Section):
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
        default=None, description="train on a few images a class only"
    )
    synthesis: SynthesisSpec | None = Field(
        default=None, description="make images for scarce classes"
    )
    active: ActiveSpec | None = Field(
        default=None, description="buy labels in rounds, of images that a query chooses"
    )
    serve: ServeSpec | None = Field(
        default=None, description="in the place of the recipe's `serve`"
    )
    data: dict[str, Any] = Field(
        default={},
        description=f"what differs from the recipe's `data`: {', '.join(ARM_DATA)}; never the test",
    )


class ReportSpec(_Section):
    """What the report compares."""

    baseline: str | None = Field(
        default=None, description="the arm the others are measured against; the first where absent"
    )
    metric: Annotated[str, Field(max_length=100)] | None = Field(
        default=None, description="of the task's metrics; its primary one where absent"
    )
    margin: (
        Annotated[
            float,
            Field(
                ge=0,
                le=1e6,
                description="how much of the metric an arm may lose and still keep it: points of a "
                "share (0.5 where absent), else in the metric's unit (0)",
            ),
        ]
        | None
    ) = None
    title: str | None = None
    note: str | None = Field(
        default=None,
        description="what its author has to say of the outcome, shown below the verdict",
    )


class MeterSpec(_Section):
    """Where the energy comes from and where the machine stands."""

    country: str | None = Field(
        default=None, description="ISO-3 code; the world average, marked as assumed, where absent"
    )
    intensity: Annotated[float, Field(ge=0, description="grams of CO2e per kWh")] | None = None
    pue: Annotated[float, Field(ge=1)] = 1.0
    codecarbon: bool = Field(
        default=True, description="record codecarbon's own figure as a cross-check"
    )
    own_caches: bool = Field(
        default=False,
        description="no run reads what another computed of a frozen part: each pays for all it "
        "uses",
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
    serve: ServeSpec | None = None
    stage: str = ""
    layers: tuple[str, ...] = ()
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


class Recipe(_Section):
    """One runnable experiment: data, a model, how to train, and the arms to compare."""

    model_config = ConfigDict(protected_namespaces=())

    name: Annotated[Name, Field(description="also the folder of runs and report")]
    data: DataSpec
    model: ModelSpec
    task: Annotated[
        str | dict[str, dict[str, Any] | None],
        Field(description="what the model answers, by name, or {NAME: {its fields}}"),
    ] = "classification"
    train: TrainSpec = TrainSpec()
    serve: Annotated[
        ServeSpec | None, Field(description="how models are served; batches of 64 where absent")
    ] = None
    arms: Annotated[dict[Name, ArmSpec], Field(min_length=1)]
    frontier: FrontierSpec | None = Field(
        default=None, description="plain arms that savings are read against; {} for the usual ones"
    )
    report: ReportSpec = ReportSpec()
    meter: MeterSpec = MeterSpec()

    _path: Path = PrivateAttr(default=Path("recipe"))
    _source: dict[str, Any] = PrivateAttr(default_factory=dict)
    _lines: dict[Key, str] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Paths in the recipe are relative to this folder."""
        return self._path.parent

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return self._path

    @property
    def baseline(self) -> str:
        """The arm the others are measured against."""
        return self.report.baseline or next(iter(self.arms))

    def text(self) -> str:
        """Return the recipe as YAML with inheritance and overrides applied: enough to run it
        again."""
        return yaml.safe_dump(self._source, sort_keys=False, allow_unicode=True)

    def where(self, *key: str | int) -> str:
        """Return "file:line" of a key, or of the nearest one above it."""
        for end in range(len(key), -1, -1):
            if key[:end] in self._lines:
                return self._lines[key[:end]]
        return str(self._path)

    def arm(self, name: str) -> Arm:
        """Return the arm with the recipe's own model and train filled in; a model of another `ref`
        inherits no options."""
        spec = self.arms[name]
        other = spec.model.get("ref", self.model.ref) != self.model.ref
        model = {**({} if other else self.model.model_dump(exclude_unset=True)), **spec.model}
        train = {**self.train.model_dump(exclude_unset=True), **spec.train}
        if spec.stream and self.data.stream is None:
            raise BadInput(
                f"{self.where('arms', name, 'stream')}: data.stream is missing, so there is "
                "nothing to change here"
            )
        own = self.data.stream and {
            **self.data.stream.model_dump(exclude_unset=True),
            **spec.stream,
        }
        at = ("arms", name, "techniques")
        techniques = tuple(
            _named(registry.find, item, self.where, (*at, i))
            for i, item in enumerate(spec.techniques)
        )
        arm = Arm(
            name=name,
            data=self._arm_data(name),
            model=_valid(ModelSpec, model, self.where, ("arms", name, "model")),
            task=_named(task_registry.find, self.task, self.where, ("task",)),
            train=_valid(TrainSpec, train, self.where, ("arms", name, "train")),
            techniques=techniques,
            stream=None
            if own is None
            else _valid(StreamSpec, own, self.where, ("arms", name, "stream")),
            subset=spec.subset,
            synthesis=spec.synthesis,
            active=spec.active,
            serve=spec.serve or self.serve,
        )
        recipe_checks.refuse_active(self, arm)
        recipe_checks.refuse_synthesis(self, arm)
        if arm.stream is not None and arm.subset is not None:
            raise BadInput(
                f"{self.where('arms', name, 'subset')}: an arm has a subset or data.stream, not "
                "both"
            )
        return arm.model_copy(update={"stages": self._stages(arm)})

    def _arm_data(self, name: str) -> DataSpec:
        """Return the recipe's data with the arm's own budgets."""
        own = self.arms[name].data
        if not own:
            return self.data
        at = ("arms", name, "data")
        if denied := [key for key in own if key in DataSpec.model_fields and key not in ARM_DATA]:
            raise BadInput(
                f"{self.where(*at, denied[0])}: data.{denied[0]} is the same for all arms, so that "
                f"they are tested on the same images; an arm may set {', '.join(ARM_DATA)}"
            )
        every = {**self.data.model_dump(exclude_unset=True), **own}
        return _valid(DataSpec, every, self.where, at)

    def _stages(self, arm: Arm) -> tuple[Arm, ...]:
        """Return the arm's stages, each as an arm of its own."""
        specs, at = self.arms[arm.name].stages, ("arms", arm.name, "stages")
        for beside, present in (("techniques", arm.techniques), ("data.stream", arm.stream)):
            if specs and present:
                raise BadInput(
                    f"{self.where(*at)}: an arm has stages or {beside}, not both; a stage has its "
                    "own techniques"
                )
        out: list[Arm] = []
        for i, spec in enumerate(specs):
            stage = spec.name or f"stage{i + 1}"
            run_wide = sorted({"seeds", "threads"} & spec.train.keys())
            if run_wide or stage in [s.stage for s in out]:
                names = (
                    f"train.{run_wide[0]} belongs to the whole arm"
                    if run_wide
                    else f"a second stage is named '{stage}'"
                )
                raise BadInput(f"{self.where(*at, i)}: {names}")
            own = {**arm.train.model_dump(exclude_unset=True), **spec.train}
            made = [
                _named(registry.find, item, self.where, (*at, i, "techniques", j))
                for j, item in enumerate(spec.techniques)
            ]
            train = _valid(TrainSpec, own, self.where, (*at, i, "train"))
            update = {
                "stage": stage,
                "train": train,
                "techniques": tuple(made),
                "layers": spec.layers,
            }
            out.append(arm.model_copy(update=update))
        return tuple(out)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its `extends:` parents and `overrides` ("train.epochs=3"), and check all of it
    but the files it names.

    Raises BadInput with file:line and the nearest right name.

    Example:
        >>> loaded = gv.load_recipe(recipe, ["train.epochs=3"])
        >>> loaded.train.epochs, list(loaded.arms)
        (3, ['plain', 'frozen'])
    """
    path = Path(path)
    source, lines = yamlfile.read(path)
    for text in overrides:
        yamlfile.override(source, lines, text)

    def where(*key: str | int) -> str:
        return next(
            (lines[key[:end]] for end in range(len(key), -1, -1) if key[:end] in lines), str(path)
        )

    recipe_checks.refuse_unknown_models(source, where)  # before techniques import torch
    try:
        recipe = Recipe(**source)
    except ValidationError as error:
        raise BadInput(explain(error, Recipe, where, ())) from error
    recipe._path, recipe._source, recipe._lines = path, source, lines
    if recipe.baseline not in recipe.arms:
        raise BadInput(
            f"{where('report', 'baseline')}: report.baseline '{recipe.baseline}' is no arm"
            f"{nearest(recipe.baseline, recipe.arms)}"
        )
    if recipe.frontier is not None:
        recipe = _with_ladder(recipe)
    recipe_checks.refuse_idle(recipe)
    recipe_checks.refuse_unknown_metric(recipe)
    return recipe


def _with_ladder(recipe: Recipe) -> Recipe:
    """Return the recipe with the plain arms of its frontier."""
    rungs = {
        name: _valid(ArmSpec, fields, recipe.where, ("frontier",))
        for name, fields in ladder(recipe).items()
    }
    return recipe.model_copy(update={"arms": {**recipe.arms, **rungs}})


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with that of each technique and task under `$defs`."""
    out = Recipe.model_json_schema()
    out["properties"]["extends"] = {
        "type": "string",
        "description": "a recipe to start from, relative to this one",
    }
    for name in registry.names():
        out.setdefault("$defs", {})[f"technique:{name}"] = registry.about(name)["schema"]
    for name in task_registry.names():
        out["$defs"][f"task:{name}"] = task_registry.find(name).model_json_schema()
    return out


def parse_techniques(text: str) -> list[Technique]:
    """Return techniques written as in a recipe, YAML or JSON: '[{lora: {rank: 8}}]'. Raises
    BadInput."""
    items = yamlfile.parse(text, "techniques")
    entries = items if isinstance(items, list) else [items]
    where: Where = lambda *key: "techniques"  # noqa: E731
    return [_named(registry.find, item, where, (i,)) for i, item in enumerate(entries)]


def _named(find: Callable[[str], type[Any]], item: Any, where: Where, at: Key) -> Any:
    """Return what an entry asks for, "NAME" or {NAME: {fields}}."""
    entry = {item: {}} if isinstance(item, str) else item
    if not isinstance(entry, dict) or len(entry) != 1:
        raise BadInput(
            f"{where(*at)}: one name an item, with its fields below it, as in "
            f"'lora: {{rank: 8}}', not {format_value(item)}"
        )
    ((name, fields),) = entry.items()
    try:
        kind = find(name)
    except BadInput as error:
        raise BadInput(f"{where(*at, name)}: {error}") from error
    return _valid(kind, fields or {}, where, (*at, name))


def _valid(kind: type[Any], fields: Mapping[str, Any], where: Where, at: Key) -> Any:
    try:
        return kind(**fields)
    except (ValidationError, BadInput) as error:
        problem = error if isinstance(error, ValidationError) else error.__cause__
        if not isinstance(problem, ValidationError):
            raise
        raise BadInput(explain(problem, kind, where, at)) from error
