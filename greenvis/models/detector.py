"""Boxes with classes from any backbone: torchvision's one-stage detector on the maps of its
stages."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from greenvis.models.maps import StageMaps
from greenvis.models.structure import View

WIDTH = 64  # channels of each map
CONVOLUTIONS = 2  # of the head, on each map
LEAST_SCORE = 0.05  # of a box that is answered
FINEST = 4  # pixels of an image to one of a map: finer maps are not looked at


def detector(backbone: nn.Module, structure: View, classes: int) -> FCOS:
    """Return a fully convolutional one-stage detector (Tian et al., 2019) on a pyramid of maps (Lin
    et al., 2017), called as torchvision's detectors are.

    Images come as the data brings them: of any size, and normalised there.

    Args:
        backbone: A classifier; what stands behind its last stage leaves it.
        structure: `structure.view` of it.
        classes: How many, with the background, which is 0.

    Raises:
        BadInput: As `StageMaps`.
    """
    pyramid = Pyramid(backbone, structure)
    model = FCOS(
        pyramid,
        classes,
        anchor_generator=AnchorGenerator(
            tuple((side,) for side in pyramid.strides), ((1.0,),) * len(pyramid.strides)
        ),
        head=FCOSHead(WIDTH, 1, classes, CONVOLUTIONS),
        score_thresh=LEAST_SCORE,
    )
    model.transform = _AsTheyAre()
    return model


class Pyramid(StageMaps):
    """Maps of equal width: each stage's, to which the coarser ones are added.

    Args:
        backbone: A classifier.
        structure: `structure.view` of it.

    Attributes:
        strides: Pixels of an image to one of each map.
        out_channels: Of each map, as torchvision asks for it.
    """

    def __init__(self, backbone: nn.Module, structure: View) -> None:
        super().__init__(backbone, structure, "boxes")
        side = structure.example.shape[-1]
        # of stages as fine as each other, the last; of a backbone without coarse ones, its last
        last = {round(side / m.shape[-1]): i for i, m in enumerate(self.probed)}
        self.used = {s: i for s, i in last.items() if s >= FINEST} or dict([*last.items()][-1:])
        self.strides, self.out_channels = tuple(self.used), WIDTH
        self.join = FeaturePyramidNetwork(
            [self.probed[i].shape[1] for i in self.used.values()], WIDTH
        ).to(self.probed[0])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps (batch, width, height, width) of images, by number, the finest first."""
        maps = self.maps(x)
        return self.join(OrderedDict((str(i), maps[i]) for i in self.used.values()))


class _AsTheyAre(GeneralizedRCNNTransform):
    """Images as one batch, neither resized nor normalised."""

    def __init__(self) -> None:
        super().__init__(0, 0, [0.0], [1.0], size_divisible=1)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target
