"""A task from outside: classes as before, another loss and one more metric."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from greenvis.tasks.base import Measure
from greenvis.tasks.classification import Classification


class Focal(Classification):
    """One class per image, by the focal loss: what is sure weighs little. (Lin et al., 2017, eq. 4)

    Its metrics are accuracy, and the mean of the classes' recalls.
    """

    name: ClassVar[str] = "focal"
    secondary: ClassVar[tuple[Measure, ...] | None] = (Measure("recall"),)
    gamma: Annotated[float, Field(ge=0, description="0 is cross entropy")] = 2.0

    def losses(self, outputs: Any, labels: Any) -> Any:
        """Return (1 - p)^gamma times the cross entropy of each image, (batch,)."""
        entropy = super().losses(outputs, labels)
        return (1 - (-entropy).exp()) ** self.gamma * entropy

    def loss(self, outputs: Any, labels: Any) -> Any:
        """Return their mean."""
        return self.losses(outputs, labels).mean()

    def metrics(self, classes: int) -> dict[str, Any]:
        """Return accuracy and "recall", 0 to 1 each."""
        from torchmetrics.classification import MulticlassRecall

        return {**super().metrics(classes), "recall": MulticlassRecall(classes, average="macro")}
