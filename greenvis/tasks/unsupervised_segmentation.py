"""One cluster per pixel, matched with classes by the test alone: segmentation that no mask
taught."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from greenvis.tasks.base import Measure
from greenvis.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class UnsupervisedSegmentation(Segmentation):
    """One cluster per pixel: outputs (batch, clusters, height, width), masks (batch, height,
    width), -1 where not known; 0 is the background of both.

    Clusters have no names: each is judged as the class that it shares most images with, one class
    each (Hungarian matching; LUSS: Gao et al., 2022), found on the test's masks themselves, which
    no training and no choice sees. Masks to train on may be used (a rival taught by some): the
    loss is that of segmentation.
    """

    name: ClassVar[str] = "unsupervised_segmentation"
    secondary: ClassVar[tuple[Measure, ...] | None] = (
        Measure("boundary_miou"),
        Measure("image_accuracy"),
        Measure("f_beta"),
    )

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"miou": mean IoU over all classes with the background, 0 of one that occurs
        nowhere; "boundary_miou": the same of what lies within a band along borders;
        "image_accuracy": whether an image shows the class that fills most of its foreground;
        "f_beta": of foreground against background, β² = 0.3, a mean over images}, 0 to 1."""
        from greenvis.tasks._matching import Foreground, ImageAccuracy, MatchedBoundary, MatchedIoU

        return {
            "miou": MatchedIoU(classes),
            "boundary_miou": MatchedBoundary(classes, self.band),
            "image_accuracy": ImageAccuracy(classes),
            "f_beta": Foreground(),
        }

    def segments(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the class that each pixel's cluster is matched with by masks (batch, height,
        width) of these images: (batch, height, width), of outputs (batch, clusters, height,
        width)."""
        from greenvis.tasks._matching import MatchedIoU

        clusters = MatchedIoU(outputs.shape[1])
        clusters.update(outputs, labels)
        return clusters.order()[outputs.argmax(1)]
