"""The classification and segmentation data sets of torchvision, by the names of its classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenvis.data.dataset import DataSet
from greenvis.data.downloads import DOWNLOADS, fetching
from greenvis.data.sets._torchvision_masks import SETS as MASKED
from greenvis.data.sets._torchvision_masks import Masked
from greenvis.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.splits import Stored

BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
WITH_VAL = {"train": {"split": "train"}, "test": {"split": "val"}}
WITH_TRAINVAL = {"train": {"split": "trainval"}, "test": {"split": "test"}}
UNDIVIDED: dict[str, dict[str, Any]] = {"train": {}}
# arguments of torchvision's class for each split; a fifth of each class is the test where it has
# but one
SPLITS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": BY_FLAG,
    "CIFAR100": BY_FLAG,
    "CLEVRClassification": WITH_VAL,
    "Country211": BY_SPLIT,
    "DTD": BY_SPLIT,
    "EMNIST": {part: {"split": "balanced", **flag} for part, flag in BY_FLAG.items()},
    "EuroSAT": UNDIVIDED,
    "FGVCAircraft": WITH_TRAINVAL,
    "FashionMNIST": BY_FLAG,
    "Flowers102": BY_SPLIT,
    "Food101": BY_SPLIT,
    "GTSRB": BY_SPLIT,
    "Imagenette": WITH_VAL,
    "KMNIST": BY_FLAG,
    "LFWPeople": UNDIVIDED,
    "MNIST": BY_FLAG,
    "Omniglot": UNDIVIDED,
    "OxfordIIITPet": WITH_TRAINVAL,
    "Places365": {"train": {"split": "train-standard"}, "test": {"split": "val"}},
    "QMNIST": BY_FLAG,
    "RenderedSST2": BY_SPLIT,
    "SEMEION": UNDIVIDED,
    "STL10": BY_SPLIT,
    "SUN397": UNDIVIDED,
    "SVHN": BY_SPLIT,
    "USPS": BY_FLAG,
}
# class folders as they come, which greenvis reads itself
FOLDERS = ("Caltech101", "Caltech256", "INaturalist", "ImageFolder", "ImageNet")


class Torchvision(DataSet):
    """A classification or segmentation data set of torchvision, its images decoded within the
    limits of all others.

    Each pixel has a class in `VOCSegmentation`, `SBDataset`, `Cityscapes`, `OxfordIIITPet-masks`.
    """

    name = "torchvision"
    argument = "NAME"
    values = (*SPLITS, *MASKED)
    source = "https://docs.pytorch.org/vision/stable/datasets.html"
    licence = "that of the data set: see its page"
    options = frozenset({"root", "download"})

    def check(self) -> None:
        """Raise BadInput for an unknown name."""
        if self.value in FOLDERS:
            raise BadInput(
                f"torchvision: {self.value} is a folder for each class; use folder:PATH with the "
                "folder that holds them, or `train` and `val`"
            )
        if self.value not in self.values:
            raise BadInput(
                f"unknown data set 'torchvision:{self.value}'{nearest(self.value, self.values)}"
            )

    def fetch(self) -> Path:
        """Fetch the files of all splits."""
        self.check()
        asking = Torchvision(self.spec.model_copy(update={"download": True}), self.folder)
        for options in self._splits.values():
            asking._open(options)
        return self.root or DOWNLOADS

    def read(self) -> Stored:
        """Return all images; those in files of their own are still to be decoded."""
        import numpy as np
        import torch
        from torch import Tensor

        from greenvis.data import images
        from greenvis.data.splits import Split, Stored, divide_by_share, sha256

        self.check()
        parts = [self._open(options) for options in self._splits.values()]
        if self.value in MASKED:
            return _with_masks(parts, MASKED[self.value])
        chunks: list[bytes | Path] = []
        splits = []
        for dataset in parts:
            pixels = _pixels(dataset)
            if pixels is None:
                paths, labels = _paths(dataset)
                splits.append(Split(images.lazy(paths), torch.tensor(labels)))
                chunks += [c for path in paths for c in (path.name.encode(), path)]
            else:
                labels = _labels(dataset)
                splits.append(Split(pixels, torch.tensor(labels)))
                chunks.append(pixels.numpy().tobytes())
            chunks.append(np.asarray(labels, np.int64).tobytes())
        train, test = splits if len(splits) == 2 else divide_by_share(splits[0])
        first = splits[0]
        classes = _classes(parts[0], max(int(s.labels.max()) for s in splits) + 1)
        shape = first.images.shape[1:] if isinstance(first.images, Tensor) else (3, 224, 224)
        return Stored(train, test, classes, sha256(chunks), shape[-1], shape[0])

    @property
    def _splits(self) -> dict[str, dict[str, Any]]:
        masked = MASKED.get(self.value)
        return SPLITS[self.value] if masked is None else masked.splits

    def _open(self, options: Mapping[str, Any]) -> Any:
        """Return torchvision's data set of one split. Raises BadInput where its files are not
        here."""
        from torchvision import datasets

        masked = MASKED.get(self.value)
        cls = getattr(datasets, self.value if masked is None else masked.cls)
        root = self.root or DOWNLOADS
        takes = inspect.signature(cls).parameters
        arguments = dict(options)
        if "download" in takes or "kwargs" in takes:
            arguments["download"] = self.spec.download
        if "loader" in takes:
            arguments["loader"] = Path  # nothing is decoded but by our own decoder
        otherwise = (
            f"its files are to lie below {root} as torchvision lays them out; name another folder "
            "with `root`, or set `download: true`"
        )
        if self.value == "USPS":
            _check_usps(cls, root, options["train"], self.spec.download, otherwise)
        try:
            if not self.spec.download:
                return cls(str(root), **arguments)
            root.mkdir(parents=True, exist_ok=True)
            with fetching(self.spec.name, f"get its files by hand: {self.source}"):
                return cls(str(root), **arguments)
        except BadInput:
            raise
        except Exception as error:  # torchvision raises many kinds where files are missing or bad
            raise BadInput(f"{self.spec.name}: {error}; {otherwise}") from error


def _with_masks(parts: Sequence[Any], masked: Masked) -> Stored:
    """Return images and masks of both splits, still to be decoded."""
    from greenvis.data import images
    from greenvis.data.splits import Split, Stored, sha256

    splits, chunks = [], []
    for dataset in parts:
        shown, masks = ([Path(path) for path in paths] for paths in masked.pairs(dataset))
        splits.append(Split(images.lazy(shown), masked.lazy(masks, masked.numbers)))
        chunks += [c for path in (*shown, *masks) for c in (path.name.encode(), path)]
    return Stored(splits[0], splits[1], masked.classes, sha256(chunks), 224, 3)


def _check_usps(cls: Any, root: Path, train: bool, download: bool, otherwise: str) -> None:
    """Raise BadInput where the packed file is another than the published one, as torchvision
    itself checks for the others: unpacked, it could be of any size."""
    from torchvision.datasets.utils import check_integrity

    _, filename, md5 = cls.split_list["train" if train else "test"]
    path = root / filename
    if (path.exists() or not download) and not check_integrity(path, md5):
        raise BadInput(f"torchvision:USPS: no {filename}, or not the published one; {otherwise}")


def _pixels(dataset: Any) -> Tensor | None:
    """Return the images that a data set holds in memory, uint8 (N, C, H, W); None where they lie
    in files."""
    import numpy as np
    import torch
    from torch import Tensor

    array = getattr(dataset, "data", None)
    if isinstance(array, Tensor):
        array = array.numpy()
    if not isinstance(array, np.ndarray):
        return None
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[-1] == 3:
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array, np.uint8))


def _labels(dataset: Any) -> list[int]:
    """Return the labels of images held in memory."""
    import numpy as np

    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    return (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64).tolist()


def _paths(dataset: Any) -> tuple[list[Path], list[int]]:
    """Return image files and labels. Where torchvision's class takes no loader, its own lists are
    read."""
    kind = type(dataset).__name__
    if kind == "GTSRB":
        pairs: Sequence[tuple[Any, int]] = dataset._samples
    elif kind == "OxfordIIITPet":
        pairs = list(zip(dataset._images, dataset._labels, strict=True))
    else:
        pairs = [dataset[row] for row in range(len(dataset))]
    return [Path(path) for path, _ in pairs], [int(label) for _, label in pairs]


def _classes(dataset: Any, count: int) -> tuple[str, ...]:
    """Return the names of classes; numbers where torchvision has none."""
    names = getattr(dataset, "classes", None) or list(getattr(dataset, "class_to_idx", ()))
    if len(names) < count:
        return tuple(map(str, range(count)))
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names)
