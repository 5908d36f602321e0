"""One class per image: cross entropy, and the share of right answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Classification(Task):
    """One class per image: logits (batch, classes), labels (batch,) or their probabilities."""

    name: ClassVar[str] = "classification"
    form: ClassVar[str] = "classification"
    primary: ClassVar[Measure] = Measure("accuracy")
    secondary: ClassVar[tuple[Measure, ...] | None] = ()

    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of a label that all classes divide")
    ] = 0.0

    def outputs(self, raw: Any) -> Tensor:
        """Return the logits (batch, classes). Raises BadInput for what has none."""
        logits = answers.logits_of(raw)
        if logits.dim() != 2:
            raise BadInput(
                f"an answer {tuple(logits.shape)} is not (batch, classes): give the model a "
                "classifier, or name another task"
            )
        return logits

    def known(self, labels: Any) -> Tensor | None:
        """Return which images have a class."""
        return None if labels.is_floating_point() else labels >= 0

    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the cross entropy of each image, (batch,); 0 of a label of -1."""
        import torch.nn.functional as F

        return F.cross_entropy(
            outputs,
            labels,
            label_smoothing=self.label_smoothing,
            ignore_index=answers.UNKNOWN,
            reduction="none",
        )

    def loss(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the mean cross entropy over the images whose label is known."""
        return answers.cross_entropy(outputs, labels, self.label_smoothing)

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"accuracy": top-1, 0 to 1}."""
        from greenvis.tasks._metrics import Accuracy

        return {"accuracy": Accuracy(classes)}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs of too few classes, and labels that are no classes. Raises BadInput."""
        if outputs.dim() != 2 or (classes is not None and outputs.shape[1] < classes):
            raise BadInput(
                f"the model answers with {tuple(outputs.shape)}, but the data has {classes} "
                "classes: set num_classes of the model"
            )
        if labels is not None and (form := answers.task_of(outputs, labels)) != self.form:
            raise BadInput(
                f"these answers and labels are {form} ({answers.FORMS[form]}), not {self.form} "
                f"({answers.FORMS[self.form]}): name the task, or give other labels"
            )

    def example(self, size: int) -> TaskExample:
        """Return logits of three classes, labels, and logits that are right."""
        import torch
        import torch.nn.functional as F

        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(3, (size,), generator=generator)
        best = 50.0 * F.one_hot(labels, 3)
        return TaskExample(torch.randn(size, 3, generator=generator), labels, best)
