"""One class per pixel: cross entropy over classes, judged by the mean intersection over union."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

PICTURES = ("test images", "masks", "answers")  # of segments, in a record


class Segmentation(Task):
    """One class per pixel: logits (batch, classes, height, width), labels (batch, height, width),
    -1 where not known."""

    name: ClassVar[str] = "segmentation"
    form: ClassVar[str] = "segmentation"
    primary: ClassVar[Measure] = Measure("miou")
    secondary: ClassVar[tuple[Measure, ...] | None] = (
        Measure("boundary_miou"),
        Measure("pixel_accuracy"),
    )

    band: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="width of the band along borders that boundary_miou looks at, as a share "
            "of the diagonal",
        ),
    ] = 0.02

    def outputs(self, raw: Any) -> Tensor:
        """Return the logits (batch, classes, height, width). Raises BadInput for what has none."""
        logits = answers.logits_of(raw)
        if logits.dim() != 4:
            raise BadInput(
                f"an answer {tuple(logits.shape)} is not (batch, classes, height, width): give the "
                "model `head: dense`, take a model that segments, or name another task"
            )
        return logits

    def known(self, labels: Any) -> Tensor:
        """Return which images have a pixel with a class."""
        return (labels != answers.UNKNOWN).flatten(1).any(1)

    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the cross entropy of each image, a mean over its pixels with a class."""
        import torch.nn.functional as F

        known = labels != answers.UNKNOWN
        pixels = F.cross_entropy(
            outputs, labels, ignore_index=answers.UNKNOWN, reduction="none"
        ).flatten(1)
        return pixels.sum(1) / known.flatten(1).sum(1).clamp(min=1)

    def loss(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the mean cross entropy over all pixels with a class."""
        return answers.cross_entropy(outputs, labels)

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"miou": mean IoU over classes that occur, "boundary_miou": the same within a band
        along borders (Cheng et al., 2021), "pixel_accuracy"}, 0 to 1."""
        from greenvis.tasks._metrics import BoundaryIoU, MeanIoU, PixelAccuracy

        return {
            "miou": MeanIoU(classes),
            "boundary_miou": BoundaryIoU(classes, self.band),
            "pixel_accuracy": PixelAccuracy(classes),
        }

    def segments(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the class of each pixel, (batch, height, width), of outputs (batch, classes,
        height, width)."""
        return outputs.argmax(1)

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs of too few classes, and labels of another size or kind."""
        if outputs.dim() != 4 or (classes is not None and outputs.shape[1] < classes):
            raise BadInput(
                f"the model answers with {tuple(outputs.shape)}, but segmentation of {classes} "
                "classes wants (batch, classes, height, width): set num_classes of the model"
            )
        if labels is None:
            return
        places = outputs.shape[:1] + outputs.shape[2:]
        if not answers.is_tensor(labels) or labels.shape != places or labels.is_floating_point():
            raise BadInput(
                f"segmentation wants a class number for each of {tuple(places)}, not "
                f"{answers.shape_of(labels)}: bring the model's answer to the size of the masks "
                "(`head: dense` does), or name another task"
            )

    def example(self, size: int) -> TaskExample:
        """Return logits of three classes, masks of unequal size, and logits that are right."""
        import torch
        import torch.nn.functional as F

        generator = torch.Generator().manual_seed(0)
        labels = torch.zeros(size, 9, 7, dtype=torch.int64)
        labels[:, 2:6, 1:5] = 1
        labels[::2, 6:, 4:] = 2
        best = 50.0 * F.one_hot(labels, 3).movedim(-1, 1)
        return TaskExample(torch.randn(size, 3, 9, 7, generator=generator), labels, best)
