"""Numbers, not classes: squared or Huber loss, judged by the root mean squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks._entries import EntryTask
from greenvis.tasks.base import Measure, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Regression(EntryTask):
    """Numbers: outputs (batch, numbers), labels float32 alike, NaN where one is not known."""

    name: ClassVar[str] = "regression"
    form: ClassVar[str] = "regression"
    class_axis: ClassVar[int | None] = None

    quantity: Annotated[str, Field(max_length=20, description='unit of the numbers, as "mm"')] = ""
    criterion: Annotated[
        Literal["mse", "huber"], Field(description="squared error, or linear beyond `delta`")
    ] = "mse"
    delta: Annotated[float, Field(gt=0, description="of huber, in units of the numbers")] = 1.0

    @property
    def primary(self) -> Measure:  # type: ignore[override]
        """The root mean squared error, in the unit of the numbers."""
        return Measure("rmse", self.quantity, higher_is_better=False)

    @property
    def secondary(self) -> tuple[Measure, ...]:  # type: ignore[override]
        """The mean absolute error."""
        return (Measure("abs_error", self.quantity, higher_is_better=False),)

    def outputs(self, raw: Any) -> Tensor:
        """Return the numbers (batch, numbers). Raises BadInput for what has none."""
        numbers = answers.logits_of(raw)
        if numbers.dim() != 2:
            raise BadInput(f"an answer {tuple(numbers.shape)} is not (batch, numbers)")
        return numbers

    def known(self, labels: Any) -> Tensor:
        """Return which samples have a number."""
        return (~labels.isnan()).any(1)

    def entries(self, outputs: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of each entry, and whether it is known."""
        import torch
        import torch.nn.functional as F

        known = ~labels.isnan()
        targets = torch.where(known, labels.to(outputs.dtype), outputs.detach())
        if self.criterion == "mse":
            return F.mse_loss(outputs, targets, reduction="none"), known
        return F.huber_loss(outputs, targets, reduction="none", delta=self.delta), known

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"rmse", "abs_error"}, in the unit of the numbers."""
        from greenvis.tasks._metrics import NumberError

        return {"rmse": NumberError(squared=True), "abs_error": NumberError(squared=False)}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs and labels of different shapes, which would be broadcast."""
        if outputs.dim() != 2:
            raise BadInput(f"the model answers with {tuple(outputs.shape)}, not (batch, numbers)")
        if labels is None:
            return
        fits = answers.is_tensor(labels) and labels.shape == outputs.shape
        if not fits or not labels.is_floating_point():
            raise BadInput(
                f"regression wants a number for each of {tuple(outputs.shape)}, not "
                f"{answers.shape_of(labels)}: set num_classes of the model to the numbers per "
                "image, and give labels float32 (batch, numbers)"
            )

    def example(self, size: int) -> TaskExample:
        """Return two numbers per sample, labels, and numbers that are right."""
        import torch

        generator = torch.Generator().manual_seed(0)
        labels = torch.randn(size, 2, generator=generator)
        return TaskExample(torch.randn(size, 2, generator=generator), labels, labels.clone())
