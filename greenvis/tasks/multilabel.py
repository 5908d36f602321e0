"""Several classes per image, or none: a yes or no for each, judged by mean average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks._entries import EntryTask
from greenvis.tasks.base import Measure, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Multilabel(EntryTask):
    """Several classes per image: logits (batch, classes), labels float32 (batch, classes) of 0 and
    1, -1 where nobody said."""

    name: ClassVar[str] = "multilabel"
    form: ClassVar[str] = "multilabel"
    primary: ClassVar[Measure] = Measure("map")
    secondary: ClassVar[tuple[Measure, ...] | None] = ()

    def outputs(self, raw: Any) -> Tensor:
        """Return the logits (batch, classes). Raises BadInput for what has none."""
        logits = answers.logits_of(raw)
        if logits.dim() != 2:
            raise BadInput(f"an answer {tuple(logits.shape)} is not (batch, classes)")
        return logits

    def known(self, labels: Any) -> Tensor:
        """Return which images have a label of any class."""
        return (labels != answers.UNKNOWN).any(1)

    def entries(self, outputs: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the binary cross entropy of each entry, and whether it is known."""
        import torch.nn.functional as F

        known = labels != answers.UNKNOWN
        targets = labels.to(outputs.dtype).clamp(min=0)
        entries = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return entries.masked_fill(~known, 0), known

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"map": mean average precision over classes that occur, 0 to 1}."""
        from greenvis.tasks._metrics import LabelPrecision

        return {"map": LabelPrecision(classes)}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs of other classes than the labels', and labels that are no 0, 1 or -1."""
        if outputs.dim() != 2 or (classes is not None and outputs.shape[1] != classes):
            raise BadInput(
                f"the model answers with {tuple(outputs.shape)}, but the data has {classes} "
                "classes: set num_classes of the model"
            )
        if labels is None:
            return
        if not answers.is_tensor(labels) or labels.shape != outputs.shape:
            raise BadInput(
                f"multilabel wants a label 0, 1 or -1 for each of {tuple(outputs.shape)}, not "
                f"{answers.shape_of(labels)}: give one column per class, or name another task"
            )
        if not ((labels >= answers.UNKNOWN) & (labels <= 1)).all():
            raise BadInput(
                f"multilabel wants labels from 0 to 1, or -1 where not known, not "
                f"{float(labels.min()):g} … {float(labels.max()):g}"
            )

    def example(self, size: int) -> TaskExample:
        """Return logits of three classes, labels that are unequally frequent, and right logits."""
        import torch

        generator = torch.Generator().manual_seed(0)
        often = torch.tensor([0.3, 0.5, 0.7])
        labels = (torch.rand(size, 3, generator=generator) < often).float()
        return TaskExample(
            torch.randn(size, 3, generator=generator), labels, 40.0 * (2 * labels - 1)
        )
