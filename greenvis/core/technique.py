"""What a technique is: a frozen, validated request. The live change it makes is `Installed`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from greenvis.core.installed import Experience as Experience
from greenvis.core.installed import Installed as Installed
from greenvis.core.installed import Samples as Samples
from greenvis.core.validation import OnlyWith as OnlyWith
from greenvis.core.validation import explain, refuse_idle
from greenvis.errors import BadInput
from greenvis.tasks.answers import logits_of as logits_of
from greenvis.tasks.answers import mask_classes as mask_classes

if TYPE_CHECKING:
    from torch import nn

Stage = Literal["base", "weights", "tokens", "exits", "objective"]
STAGES: tuple[Stage, ...] = ("base", "weights", "tokens", "exits", "objective")

# fields that many techniques have
InputShape = Annotated[
    tuple[int, int, int] | None,
    Field(description="(channels, height, width) of an image, if it cannot be inferred"),
]
ClassNames = Annotated[
    tuple[str, ...] | None,
    Field(description="names of the classes by label, if they are to be others than the data's"),
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
    "every_block": "every token through every block",
    "bare_layers": "layers that nothing is wrapped around",
}


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

    Example:
        >>> class Cool(gv.Technique):
        ...     name, stage = "cool", "objective"
        ...     by: float = 2.0
        ...     def install(self, model):
        ...         model.head.register_forward_hook(lambda module, args, out: out / self.by)
        ...         return gv.Installed()
        >>> before = model(x)
        >>> live = gv.wrap(model, Cool(by=4.0))
        >>> torch.equal(model(x), before / 4)
        True
        >>> torch.equal(live.undo()(x), before)
        True
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    # fields that change nothing but with these values of another, and may not be set then
    only_with: ClassVar[OnlyWith] = {}
    stage: ClassVar[Stage]
    # the stream whose images it trains on in the place of labelled ones, of which it reads none
    trains_on: ClassVar[str] = ""
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

    def for_classes(self, names: tuple[str, ...]) -> Self:
        """Return the request for classes of these names, where it asks for some and has none.

        Args:
            names: By label.

        Returns:
            The request with `classes` set, or itself.
        """
        missing = "classes" in type(self).model_fields and dict(self)["classes"] is None
        return self.model_copy(update={"classes": names}) if missing else self

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


def __getattr__(name: str) -> Any:
    if name == "Task":  # of the first releases; a task is what an answer is now
        warnings.warn("Task is Experience now", DeprecationWarning, stacklevel=2)
        return Experience
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
