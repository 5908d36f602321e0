"""What a task is: what a model answers, what its labels are, how an answer is judged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Measure(NamedTuple):
    """What a task is judged by.

    Args:
        name: Of one of the task's metrics, as in records and tables.
        unit: Such as "px"; "%" for a share, 0 to 1, that is shown in per cent; "" for a bare
            number.
        higher_is_better: Whether more of it is better.
    """

    name: str
    unit: str = "%"
    higher_is_better: bool = True


class TaskExample(NamedTuple):
    """A few answers and labels of a task, for its contract check.

    Args:
        outputs: What `Task.outputs` returns, by chance right or wrong.
        labels: As a loader yields them.
        best: Outputs that no others beat on these labels.
        learning: Where the loss is the model's own, what it returns in training.
    """

    outputs: Any
    labels: Any
    best: Any
    learning: Any = None


class Task(BaseModel):
    """What a model is to answer. Its fields are the recipe's, and the constructor's arguments.

    Subclasses set the class attributes and write `outputs`, `losses`, `metrics`, `check` and
    `example`; `greenvis.testing.check_task` runs the contract they keep.

    Attributes:
        name: As in a recipe.
        form: Which of `answers.FORMS` its answers and labels are: techniques say which of these
            they are right for. A form that no other task has is a word of its own.
        primary: What it is judged by first.
        secondary: Its other metrics; None where they are known to `metrics` alone.
        class_axis: Of the outputs; None where there are no classes.
        unit: What one answer is for: "image", "bag", "token".
        model_loss: Whether the model, told the labels, returns its own loss in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    form: ClassVar[str]
    primary: ClassVar[Measure]
    secondary: ClassVar[tuple[Measure, ...] | None] = None
    class_axis: ClassVar[int | None] = 1
    unit: ClassVar[str] = "image"
    model_loss: ClassVar[bool] = False

    def answer(self, model: Callable[..., Any], x: Any, labels: Any = None) -> Any:
        """Return what a model answers to a batch, in train or in eval mode as it is.

        Args:
            model: The model.
            x: What it takes: images (batch, channels, height, width), or an `Example`.
            labels: Read where the model computes its own loss, or draws what they name.

        Returns:
            The outputs, such as logits (batch, classes).

        Raises:
            BadInput: For what `outputs` cannot name.
        """
        return self.outputs(x.call(model) if hasattr(x, "call") else model(x))

    def serve(self, model: Callable[..., Any], x: Any, labels: Any = None) -> int:
        """Answer a batch as it is served, and return how many units (`unit`) that were."""
        self.answer(model, x, labels)
        return len(x)

    def known(self, labels: Any) -> Tensor | None:
        """Return which samples have a label to learn from, bool (batch,); None: all."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return what a run's record says of its task: name, unit, and metrics, the primary one
        first."""
        metrics = [m._asdict() for m in (self.primary, *(self.secondary or ()))]
        return {"name": self.name, "unit": self.unit, "metrics": metrics}

    @abstractmethod
    def outputs(self, raw: Any) -> Any:
        """Pick the answer from what a model returned.

        Args:
            raw: Of the model's forward.

        Returns:
            The outputs, such as logits (batch, classes).

        Raises:
            BadInput: For what it cannot name; it never guesses.
        """

    @abstractmethod
    def losses(self, outputs: Any, labels: Any) -> Tensor:
        """Return the loss of each sample, 0 where its label is not known.

        Args:
            outputs: As `outputs` returns them.
            labels: As the loader yields them; -1 (NaN of a number) where one is not known.

        Returns:
            (batch,).
        """

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the loss to train with: the mean over what is known, 0 where nothing is; a scalar
        with a graph."""
        losses, known = self.losses(outputs, labels), self.known(labels)
        return losses.mean() if known is None else losses.sum() / known.sum().clamp(min=1)

    @abstractmethod
    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return new metrics by name, the primary one among them; each takes (outputs, labels).

        Args:
            classes: Size of the class axis.
        """

    @abstractmethod
    def check(self, outputs: Any, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs and labels that do not go together.

        Args:
            outputs: As `outputs` returns them.
            labels: As the loader yields them; None where there are none.
            classes: How many the data has, where that is known.

        Raises:
            BadInput: With both shapes and what to do.
        """

    @abstractmethod
    def example(self, size: int) -> TaskExample:
        """Return `size` samples for the contract check."""
