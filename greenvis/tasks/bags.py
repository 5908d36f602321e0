"""One class per bag of images, where nobody says which image makes it so (multiple instances)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Bags(Task):
    """One class per bag: logits (bags, classes), labels int64 (bags,), -1 where not known.

    A batch is an `Example` of instances (rows, channels, height, width), packed without padding,
    and `bag`, int64 (rows,): which bag each is of.
    """

    name: ClassVar[str] = "bags"
    form: ClassVar[str] = "bags"
    primary: ClassVar[Measure] = Measure("auc")
    secondary: ClassVar[tuple[Measure, ...] | None] = (Measure("bag_accuracy"),)
    unit: ClassVar[str] = "bag"

    def facts(self) -> dict[str, Any]:
        """Return what a run's record says of its task; "instance_auc" is how well images are ranked
        within positive bags, where the data knows which make them so."""
        facts = super().facts()
        facts["metrics"].append(Measure("instance_auc")._asdict())
        return facts

    def outputs(self, raw: Any) -> Tensor:
        """Return the logits (bags, classes). Raises BadInput for what has none."""
        logits = answers.logits_of(raw)
        if logits.dim() != 2:
            raise BadInput(
                f"an answer {tuple(logits.shape)} is not (bags, classes): give the model "
                "`head: bags`, or name another task"
            )
        return logits

    def known(self, labels: Any) -> Tensor:
        """Return which bags have a class."""
        return labels != answers.UNKNOWN

    def losses(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the cross entropy of each bag, 0 of a label of -1."""
        import torch.nn.functional as F

        return F.cross_entropy(outputs, labels, ignore_index=answers.UNKNOWN, reduction="none")

    def loss(self, outputs: Tensor, labels: Any) -> Tensor:
        """Return the mean cross entropy over bags with a class."""
        return answers.cross_entropy(outputs, labels)

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"auc": area under the ROC curve, one class against the rest, a mean over classes
        that occur, "bag_accuracy"}, 0 to 1."""
        from greenvis.tasks._metrics import BagAuc, PixelAccuracy

        return {"auc": BagAuc(classes), "bag_accuracy": PixelAccuracy(classes)}

    def check(self, outputs: Tensor, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs of too few classes, and labels that are not one class number per bag."""
        if outputs.dim() != 2 or outputs.shape[1] < max(2, classes or 2):
            raise BadInput(
                f"the model answers with {tuple(outputs.shape)}, but the bags have {classes} "
                "classes, and one logit for each is wanted: set num_classes of the model"
            )
        if labels is None:
            return
        bags = outputs.shape[:1]
        if not answers.is_tensor(labels) or labels.shape != bags or labels.is_floating_point():
            raise BadInput(
                f"bags want one class number for each of {bags[0]} bags, not "
                f"{answers.shape_of(labels)}"
            )

    def example(self, size: int) -> TaskExample:
        """Return logits of two classes, labels of which few are positive, and right logits."""
        import torch
        import torch.nn.functional as F

        generator = torch.Generator().manual_seed(0)
        labels = (torch.arange(size) % 3 == 0).long()
        return TaskExample(
            torch.randn(size, 2, generator=generator), labels, 50.0 * F.one_hot(labels, 2)
        )
