"""The segmentation data sets of torchvision: where their masks lie, and what a pixel says."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from greenvis.core import files
from greenvis.data.sets._masks import NOTHING, lazy_masks
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.splits import Lazy

MOST_BYTES = 2**26  # of a mask
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
CITIES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle",
)  # fmt: skip
# of the values that pixels of Cityscapes have, those that are a class of its benchmark, in order
CITY_VALUES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Masked(NamedTuple):
    """A data set of torchvision with a mask for each image.

    Args:
        cls: Its class.
        splits: Arguments of the class for each split.
        pairs: Returns its images and masks.
        classes: Names, by number.
        numbers: Class, or -1, by value of a pixel; others are what they say.
        lazy: Returns the masks of files, unread.
    """

    cls: str
    splits: dict[str, dict[str, Any]]
    pairs: Callable[[Any], tuple[Sequence[Any], Sequence[Any]]]
    classes: tuple[str, ...]
    numbers: Mapping[int, int]
    lazy: Callable[[Sequence[Path], Mapping[int, int]], Lazy] = lazy_masks


def lazy_mats(paths: Sequence[Path], numbers: Mapping[int, int]) -> Lazy:
    """Return the masks that lie in files of MATLAB, unread: integers (height, width)."""
    from greenvis.data.splits import Lazy

    return Lazy(partial(_read_mat, paths), range(len(paths)))


def _read_mat(paths: Sequence[Path], row: int) -> Tensor:
    import torch
    from scipy.io import loadmat

    path = paths[row]
    raw = files.read(path, "mask", MOST_BYTES)
    try:
        mask = loadmat(io.BytesIO(raw))["GTcls"][0]["Segmentation"][0]
        return torch.from_numpy(mask.astype("int16"))
    except Exception as error:  # the file is anyone's
        raise BadInput(f"cannot read the mask {path}: {error or type(error).__name__}") from error


def _by_set(*names: str) -> dict[str, dict[str, Any]]:
    return dict(zip(("train", "test"), ({"image_set": name} for name in names), strict=True))


def _of_attributes(images: str, masks: str) -> Callable[[Any], tuple[Any, Any]]:
    return lambda dataset: (getattr(dataset, images), getattr(dataset, masks))


SETS: dict[str, Masked] = {
    "VOCSegmentation": Masked(
        "VOCSegmentation",
        _by_set("train", "val"),
        _of_attributes("images", "masks"),
        VOC,
        {NOTHING: -1},
    ),
    "SBDataset": Masked(
        "SBDataset",
        {
            part: {"mode": "segmentation", **options}
            for part, options in _by_set("train_noval", "val").items()
        },
        _of_attributes("images", "masks"),
        VOC,
        {},
        lazy_mats,
    ),
    "Cityscapes": Masked(
        "Cityscapes",
        {
            part: {"split": split, "mode": "fine", "target_type": "semantic"}
            for part, split in (("train", "train"), ("test", "val"))
        },
        lambda dataset: (dataset.images, [targets[0] for targets in dataset.targets]),
        CITIES,
        {
            **dict.fromkeys(range(256), -1),
            **{value: number for number, value in enumerate(CITY_VALUES)},
        },
    ),
    "OxfordIIITPet-masks": Masked(
        "OxfordIIITPet",
        {
            part: {"split": split, "target_types": "segmentation"}
            for part, split in (("train", "trainval"), ("test", "test"))
        },
        _of_attributes("_images", "_segs"),
        ("background", "pet"),
        {1: 1, 2: 0, 3: -1},  # 3: its outline, which is not classified
    ),
}
