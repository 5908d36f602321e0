"""What a task is: what a model answers, what its labels are, how an answer is judged."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Measure(NamedTuple):
    """What a task is judged by first.

    Args:
        name: Of one of the task's metrics, as in records and tables.
        unit: Such as "px"; "" for a share.
        higher_is_better: Whether more of it is better.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True


class TaskExample(NamedTuple):
    """A few answers and labels of a task, for its contract check.

    Args:
        outputs: What `Task.outputs` returns, by chance right or wrong.
        labels: As a loader yields them.
        best: Outputs that no others beat on these labels.
    """

    outputs: Tensor
    labels: Any
    best: Tensor


class Task(BaseModel):
    """What a model is to answer. Its fields are the recipe's, and the constructor's arguments.

    Subclasses set the class attributes and write `outputs`, `losses`, `metrics`, `check` and
    `example`; `greenvis.testing.check_task` runs the contract they keep.

    Attributes:
        name: As in a recipe.
        form: Which of `answers.FORMS` its answers and labels are: techniques say which of these
            they are right for. A form that no other task has is a word of its own.
        primary: What it is judged by first.
        class_axis: Of the outputs; None where there are no classes.
        unit: What one answer is for: "image", "bag", "token".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    form: ClassVar[str]
    primary: ClassVar[Measure]
    class_axis: ClassVar[int | None] = 1
    unit: ClassVar[str] = "image"

    @abstractmethod
    def outputs(self, raw: Any) -> Tensor:
        """Pick the answer from what a model returned.

        Args:
            raw: Of the model's forward.

        Returns:
            The outputs, such as logits (batch, classes).

        Raises:
            BadInput: For what it cannot name; it never guesses.
        """

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the loss of each sample.

        Args:
            outputs: As `outputs` returns them.
            labels: As the loader yields them.

        Returns:
            (batch,).
        """

    def loss(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the loss to train with: the mean of `losses`, a scalar."""
        return self.losses(outputs, labels).mean()

    @abstractmethod
    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return new metrics by name, the primary one among them; each takes (outputs, labels).

        Args:
            classes: Size of the class axis.
        """

    @abstractmethod
    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
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
