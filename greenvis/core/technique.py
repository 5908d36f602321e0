"""What a technique is: a frozen, validated request (`Technique`) and the live change it makes
(`Installed`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from greenvis.errors import BadInput, GreenvisError, nearest, printable
from greenvis.tasks.answers import logits_of as logits_of
from greenvis.tasks.answers import mask_classes as mask_classes

if TYPE_CHECKING:
    from torch import Tensor, nn

Stage = Literal["base", "weights", "tokens", "exits", "objective"]
STAGES: tuple[Stage, ...] = ("base", "weights", "tokens", "exits", "objective")

# fields that many techniques have
InputShape = Annotated[
    tuple[int, int, int] | None,
    Field(description="(channels, height, width) of an image, if it cannot be inferred"),
]
Classifier = Annotated[
    Literal["train", "freeze"], Field(description="train the classifier in full, or leave it")
]
PrefixCache = Annotated[
    bool | Literal["fp16"],
    Field(
        description="run the frozen part once a sample and keep what it gives (fp16: half the size)"
    ),
]

# What one technique may need of the model's run and another may break; `wrap` puts these words in
# its refusal.
PROPERTIES: dict[str, str] = {
    "token_grid": "a fixed grid of tokens from block to block",
    "token_places": "a row for each patch, or a way back to it, in the tokens of every block",
    "attention_maps": "attention maps of every token pair",
    "batch_independence": "each sample's output independent of the rest of its batch",
    "trainable_base": "a base whose own weights train",
    "single_output": "one output for each sample",
    "gradients": "gradients for what it trains",
    "bare_layers": "layers that nothing is wrapped around",
}


# by field: another field, and the values of it that count
OnlyWith = Mapping[str, tuple[str, tuple[Any, ...]]]
M = TypeVar("M", bound=BaseModel)


def refuse_idle(spec: M, only_with: OnlyWith) -> M:
    """Refuse a field that differs from its default and changes nothing beside another's value.

    Args:
        spec: The model to check.
        only_with: By field: another field, and its values with which the field counts.

    Returns:
        `spec`.

    Raises:
        ValueError: Where a field is set in vain.
    """
    for name, (other, values) in only_with.items():
        chosen = getattr(spec, other)
        if chosen not in values and getattr(spec, name) != type(spec).model_fields[name].default:
            raise ValueError(
                f"'{name}' changes nothing with {other}: {chosen}; it is of {other}: "
                f"{' or '.join(map(str, values))}"
            )
    return spec


class Technique(BaseModel):
    """A request for one technique: its fields are the recipe schema, the constructor and the
    documentation at once.

    Subclasses set `name`, `stage` and write `install`. `needs` and `breaks` are keys of
    `PROPERTIES` (or words of a plug-in's own): a pair where one breaks what the other needs is
    refused by `wrap`. Nobody lists that what freezes the base breaks "trainable_base" (unless it
    needs that itself), and that what declares trainables needs "gradients". `order` is the
    place within the stage: one that adds layers of its own comes (1) after those that change the
    model's (0), which must not find them.

    For the contract (`greenvis.testing`): `examples` are arguments it tries; a callable among them
    is called with the host model. `neutral` are those that make an example leave outputs unchanged:
    none where it does so when fresh, None where nothing does. `nothing` are arguments that match
    nothing in any model, so that `install` must refuse.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    # fields that change nothing but with these values of another, and may not be set then
    only_with: ClassVar[OnlyWith] = {}
    stage: ClassVar[Stage]
    order: ClassVar[int] = 0
    role: ClassVar[str] = "teacher"  # what a run that a field names is to it, as reports call it
    rank_local: ClassVar[bool] = (
        False  # whether each of several processes holds a state of its own, as a share of a buffer
    )
    needs: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    # forms (`Task.form`) it is right for, None: all; `wrap` and each step refuse the others
    tasks: ClassVar[frozenset[str] | None] = None
    instead: ClassVar[str] = ""  # what such a refusal says to do
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    neutral: ClassVar[Mapping[str, Any] | None] = {}
    nothing: ClassVar[Mapping[str, Any] | None] = None

    if not TYPE_CHECKING:  # a type checker sees the fields as the constructor's arguments

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise BadInput(
                    explain(error, type(self), lambda *key: type(self).__name__)
                ) from error

    @model_validator(mode="after")
    def _none_is_idle(self) -> Self:
        return refuse_idle(self, self.only_with)

    def for_images(self, shape: tuple[int, ...]) -> Self:
        """Return the request for images of a shape, where it asks for one and has none.

        Args:
            shape: (channels, height, width).

        Returns:
            The request with `input_shape` set, or itself.
        """
        missing = "input_shape" in type(self).model_fields and dict(self)["input_shape"] is None
        return self.model_copy(update={"input_shape": shape}) if missing else self

    def install(self, model: nn.Module) -> Installed:
        """Change a model in place.

        Check first, change last: raise before anything is touched where the model does not fit. No
        undo is needed here: `wrap` takes a snapshot and restores it.

        Args:
            model: The model to change.

        Returns:
            The live change.

        Raises:
            BadInput: Where the model does not fit.
        """
        raise NotImplementedError

    def recipe_form(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as a recipe writes them."""
        return self.model_dump(
            mode="json", exclude_defaults=True, fallback=lambda v: type(v).__name__
        )

    def runs(self) -> dict[str, str]:
        """Return the fields that name another run, which the experiment resolves before `install`.

        Returns:
            "run:NAME" by field.
        """
        return {k: v for k, v in self if isinstance(v, str) and v.startswith("run:")}

    def with_runs(self, results: Mapping[str, Any]) -> Technique:
        """Return the request with other runs' results in place of their names.

        Args:
            results: What those runs left, by the keys of `runs`.

        Returns:
            A new request.
        """
        return self.model_copy(update=dict(results))


@dataclass(frozen=True)
class Samples:
    """Which samples a batch holds, so that what a frozen part gives for them can be cached
    (`greenvis.data.output_cache`).

    Args:
        folder: Where caches lie.
        key: What the images depend on, in words (`ImageSet.key`).
        length: Images in the data set.
        views: Augmented versions of each image; None where no version comes twice, so that nothing
            is worth caching.
        positions: int64 (batch,).
        view: Which version this batch shows, 0 to views - 1.
    """

    folder: Path
    key: Mapping[str, str]
    length: int
    views: int | None
    positions: Tensor
    view: int = 0


@dataclass(frozen=True)
class Experience:
    """One experience of a stream: the task it trains on, and what is known of it.

    Args:
        index: 0, 1, ….
        classes: The labels that occur in it.
        classes_so_far: Those that occurred so far, including its own, in order.
        count: Experiences in all, None where nobody knows.
        known: Whether a test says which task an image is of (task-incremental).
    """

    index: int
    classes: tuple[int, ...]
    classes_so_far: tuple[int, ...]
    count: int | None = None
    known: bool = False


class Installed:
    """One technique, live on a model. Every seam is optional; the defaults do nothing.

    Args:
        trainable: Names of the parameters (of the model, after install) which this technique trains
            and saves.
        freezes: True where every parameter no technique lists is to stay frozen.

    Attributes:
        unmergeable: Why the change cannot be folded into the model's own weights, if it cannot.
        samples: Which samples the current batch holds; None where the loop does not say, or where
            they were changed.
        total_steps: Optimizer steps of the training; None where the loop does not say.
        calibrates: Whether `calibrate` wants held-out images after training.
        criterion: Builds the loss that replaces the task loss; None where it does not.
    """

    pretext: ClassVar[bool] = False
    unmergeable: str = ""
    samples: Samples | None = None
    total_steps: int | None = None
    calibrates: bool = False
    criterion: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None

    def __init__(self, trainable: tuple[str, ...] = (), freezes: bool = False) -> None:
        self.trainable = trainable
        self.freezes = freezes
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.note: Callable[[str], None] = _warn  # a tracked run's record, else a warning

    # a copy of the model belongs to no run, and is shown other batches
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "phase": nullcontext, "note": _warn, "samples": None}

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch to train on, before the forward.

        Args:
            x: Images (batch, channels, height, width), or what the model takes.
            y: Labels (batch, …).

        Returns:
            The images and labels to train on.
        """
        return x, y

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return the extra loss terms of this step.

        Args:
            x: Images (batch, channels, height, width) that `batch` returned.
            y: Their labels.
            logits: (batch, classes), or the model's output that has them; None of a pretext.

        Returns:
            Scalars, already weighted, by name.
        """
        return {}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimizer groups for parameters that want other settings than the rest.

        Args:
            lr: The learning rate of the rest.

        Returns:
            Groups for a `torch.optim` optimizer.
        """
        return []

    def step_end(self) -> None:
        """After the optimizer step."""

    def epoch_end(self) -> None:
        """After an epoch."""

    def begin_experience(self, experience: Experience) -> None:
        """Before training on an experience, and before its optimizer is built: parameters may be
        added here, named in `trainable`.

        A resumed run calls it for each experience so far, in order, without training, and then
        loads the state: what it adds must depend on the experiences alone, and nothing may be added
        elsewhere.

        Args:
            experience: The experience to come.
        """

    def replacement_blocker(self, path: str) -> str:
        """Say what this technique knows of a module that a new one at its path (a larger
        classifier) would not have; asked when somebody has replaced it.

        The default speaks for techniques that are nothing but names of parameters.

        Args:
            path: Of the module.

        Returns:
            A reason; "" where nothing hangs on the old module: the new one's parameters then
            replace its parameters in `trainable`.
        """
        return "" if type(self) is Installed else "what it keeps may hang on the one that was there"

    def eval_experience(self, experience: Experience | None) -> None:
        """Before an evaluation that says which task its images are of.

        Args:
            experience: The experience; None where the test does not say, or the evaluation is over.
        """

    def end_experience(self, loader: Any) -> None:
        """At a task boundary.

        Args:
            loader: Yields (x, y) of the finished experience.
        """

    def calibrate(self, loader: Any) -> Mapping[str, Any]:
        """Choose, after training, what is to be chosen on images that no training step has seen;
        called where `calibrates`.

        Args:
            loader: Yields their (x, y).

        Returns:
            Facts for the run record.
        """
        return {}

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return settings between which the finished model can be switched without training, for a
        report to compare.

        Returns:
            New contexts by name. A setting holds within its context; the context yields facts of
            what was answered within: lists of counts ("exits": how many samples left where), and
            numbers that are means per image. Under "answer" it may say how a stream of batches is
            answered: an iterator of images to one of their logits, in order.
        """
        return {}

    def facts(self) -> Mapping[str, Any]:
        """Return what the run record should say of this technique's work, once training has ended.

        Returns:
            Facts by name.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return state that is not among the model's parameters and buffers (a replay buffer, a
        running mean).

        Returns:
            Tensors by name.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Args:
            state: Tensors by name.

        Raises:
            GreenvisError: Where this technique has no such state.
        """
        if state:
            raise GreenvisError(
                f"{type(self).__name__} holds no state of its own, but was given {sorted(state)}"
            )

    def merge(self) -> None:
        """Fold the change into the model's own weights; the default is right where nothing was
        added.

        Called by `Wrapped.merge` when the model has its own structure back (the plain modules, with
        the weights they have now), so a technique that added modules keeps references to them to
        fold from.
        """

    def undo(self) -> None:
        """Release what lies outside the model (files, a teacher's hooks). `wrap` restores the model
        itself."""


MOST_PROBLEMS = 20  # of one message


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def explain(
    error: ValidationError,
    kind: type[BaseModel],
    where: Callable[..., str],
    at: tuple[str | int, ...] = (),
) -> str:
    """Say each problem of a validation on a line: where, which key, what is wrong, the nearest
    right name.

    Args:
        error: What pydantic raised.
        kind: The model class that was validated.
        where: From a key path to what stands before it in the line ("recipe.yaml:3").
        at: The key path of the value that was validated.

    Returns:
        The message.
    """
    out = []
    for problem in error.errors():
        loc = tuple(
            p
            for p in problem["loc"]
            if not (isinstance(p, str) and p in ("str", "dict[str,nullable[dict[str,any]]]"))
        )
        key = (*at, *loc)
        path = ".".join(str(k) for k in key)
        if problem["type"] == "extra_forbidden":
            message = f"unknown field '{loc[-1]}'{nearest(str(loc[-1]), _fields(kind, loc[:-1]))}"
        elif problem["type"] == "missing":
            message = f"'{loc[-1]}' is missing"
        elif (
            problem["type"] == "value_error"
        ):  # of a check of ours, which has the value in its words
            message = str(problem.get("ctx", {}).get("error", problem["msg"]))
        else:
            text, value = problem["msg"], format_value(problem["input"])
            message = f"{text[:1].lower()}{text[1:]}, not {value}"
            if problem["type"] == "literal_error":
                message += nearest(str(problem["input"]), _choices(kind, loc))
        line = f"{where(*key)}: {path + ': ' if path else ''}{message}"
        if line not in out:
            out.append(line)
        if len(out) == MOST_PROBLEMS:
            return "\n".join([*out, f"… and {error.error_count() - MOST_PROBLEMS} more"])
    return "\n".join(out)


def _field(kind: Any, loc: tuple[Any, ...]) -> Any:
    """Return the annotation at `loc` below a model class, or None."""
    for step in loc:
        fields = getattr(kind, "model_fields", None)
        if fields and step in fields:
            kind = fields[step].annotation
        else:  # into a dict or list: the value's type
            inner = [a for a in get_args(kind) if hasattr(a, "model_fields")]
            kind = inner[0] if inner else None
    return kind


def _fields(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    return list(getattr(_field(kind, loc), "model_fields", {}))


def _choices(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    annotation = _field(kind, loc)
    return [
        str(v)
        for a in (annotation, *get_args(annotation))
        for v in (get_args(a) if get_args(a) else (a,))
        if isinstance(v, (str, int))
    ]


def format_value(value: Any) -> str:
    """Format a value for a message, cut short and printable."""
    # Python refuses to write thousands of digits
    if isinstance(value, int) and abs(value) > 10**18:
        return f"a whole number of {value.bit_length()} bits"
    text = printable(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) < 60 else text[:57] + "…"


def refuse_conflicts(techniques: Sequence[Technique]) -> None:
    """Refuse a technique listed twice, and a pair where one breaks what the other needs.

    Args:
        techniques: Those to install together.

    Raises:
        BadInput: With both names, the reason and the way out.
    """
    names = [t.name for t in techniques]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise BadInput(
            f"technique '{twice[0]}' is listed twice; list it once (one instance holds all its "
            "settings)"
        )
    for a, b in permutations(techniques, 2):
        refuse_clash(a, b, a.breaks & b.needs)


def refuse_clash(a: Technique, b: Technique, clash: frozenset[str]) -> None:
    """Refuse a pair of techniques.

    Args:
        a: The technique that breaks something.
        b: The technique that needs it.
        clash: What: keys of `PROPERTIES`.

    Raises:
        BadInput: Unless `clash` is empty.
    """
    if clash:
        what = " and ".join(PROPERTIES.get(c, c) for c in sorted(clash))
        raise BadInput(
            f"'{a.name}' and '{b.name}' do not go together: '{b.name}' needs {what}, which "
            f"'{a.name}' breaks; remove one, or use them in separate stages"
        )
