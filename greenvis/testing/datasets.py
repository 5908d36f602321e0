"""The contract every data set keeps, as a check that authors of plug-ins can run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from greenvis.data import DataSet, DataSpec, Split, Stored
from greenvis.errors import BadInput
from greenvis.testing._loop import Broken

MOST_IMAGES = 2000  # of each split: a look at more takes longer and says no more


class DataSetResult(NamedTuple):
    """How a data set does.

    dataset: its name. outcome: "works", "refuses" (its files are not here, as `reason` says) or
    "fails" (`reason` says what it breaks).
    """

    dataset: str
    outcome: str
    reason: str = ""


def check_dataset(
    cls: type[DataSet], spec: DataSpec | None = None, folder: str | Path = "."
) -> DataSetResult:
    """Try a data set against the contract.

    It says where its images come from and under which licence; every image has a label of a kind
    that `Split` lists (-1 where it is not known, in the training split alone), every class a
    training image; images are uint8
    of one size, or of one number of channels where they are read one by one; no test image is a
    training image; read twice, it is the same; what it says of itself before it is read is true.

    Args:
        cls: The class.
        spec: What a recipe says, where the name alone is not enough.
        folder: What paths in it are relative to.

    Returns:
        Whether it works; only what it says of itself was tried where its files are not here.
    """
    name = getattr(cls, "name", cls.__name__)
    try:
        for fact in ("name", "source", "licence"):
            _require(bool(getattr(cls, fact, "")), f"it has no {fact}")
        dataset = cls(spec or DataSpec(name=name), Path(folder))
        try:
            dataset.check()
        except BadInput as error:
            _require(name in str(error), f"what is missing does not name it: {error}")
            return DataSetResult(name, "refuses", str(error))
        stored = dataset.read()
        _check_labels(stored)
        prints = [_fingerprints(split, stored) for split in (stored.train, stored.test)]
        shared = len(set(prints[0]) & set(prints[1]))
        _require(not shared, f"{shared} of its test images are training images")
        _check_again(cls(spec or DataSpec(name=name), Path(folder)).read(), stored, prints)
        _check_facts(dataset, stored)
    except Broken as broken:
        return DataSetResult(name, "fails", str(broken))
    except Exception as error:  # nothing else may come out of it
        return DataSetResult(name, "fails", f"{type(error).__name__}: {error}")
    return DataSetResult(name, "works")


def _check_labels(stored: Stored) -> None:
    _require(len(set(stored.classes)) == len(stored.classes), "its classes are not distinct")
    for part, split in (("train", stored.train), ("test", stored.test)):
        _require(
            len(split) > 0 and len(split) == len(split.images),
            f"{part} has {len(split.images)} images and {len(split)} labels",
        )
        if part == "test":
            unknown = int((~split.known).sum())
            _require(not unknown, f"{unknown} of its test images have no label")
        _check_kind(part, split, stored)
    if stored.train.kind == "class":
        present = set(stored.train.labels.tolist())
        absent = [c for i, c in enumerate(stored.classes) if i not in present]
        _require(not absent, f"no training image of {absent}")
        _require(len(stored.classes) > 1, "it has one class")


def _check_kind(part: str, split: Split, stored: Stored) -> None:
    """Hold labels against what `Split` says of their kind; of those unread, the first."""
    kind, labels, most = split.kind, split.labels, len(stored.classes) - 1
    _require(kind == stored.train.kind, f"{part}'s labels are of kind {kind}, train's are not")
    if kind == "number":
        return
    if kind == "class":
        _require(labels.dtype == torch.int64, f"{part}'s labels are {labels.dtype}, not int64")
    if kind == "multilabel":
        _require(
            labels.shape[1] == len(stored.classes),
            f"{part}'s labels are {tuple(labels.shape)}, for {len(stored.classes)} classes",
        )
        most = 1
    if kind == "box":
        labels, least = labels[0]["labels"], 1
        boxes = split.labels[0]["boxes"]
        _require(
            tuple(boxes.canvas_size) == tuple(split.images[0].shape[-2:]),
            f"{part}'s boxes are on a canvas of {boxes.canvas_size}, which is not their image's",
        )
    else:
        labels = labels if isinstance(labels, Tensor) else labels[0]
        least = 0 if part == "test" and kind != "mask" else -1
    if labels.numel():
        _require(
            least <= int(labels.min()) and int(labels.max()) <= most,
            f"{part}'s labels are {labels.min()} to {labels.max()}, not {least} to {most}",
        )


def _fingerprints(split: Split, stored: Stored) -> list[str]:
    """Return a digest for each image; all those held in memory, else the first ones."""
    images = split.images
    if isinstance(images, Tensor):
        expected = (len(split.labels), stored.in_chans, stored.img_size, stored.img_size)
        _require(images.shape == expected, f"its images are {tuple(images.shape)}, not {expected}")
    rows = len(images) if isinstance(images, Tensor) else min(len(images), MOST_IMAGES)
    prints = []
    for row in range(rows):
        image = images[row]
        _require(image.dtype == torch.uint8, f"its images are {image.dtype}, not uint8")
        _require(
            image.ndim == 3 and image.shape[0] == stored.in_chans,
            f"image {row} is {tuple(image.shape)}, not ({stored.in_chans}, height, width)",
        )
        prints.append(hashlib.sha256(image.numpy().tobytes()).hexdigest())
    return prints


def _check_again(again: Stored, stored: Stored, prints: list[list[str]]) -> None:
    _require(again.checksum == stored.checksum, "read twice, its checksums differ")
    for part, old, new, seen in (
        ("train", stored.train, again.train, prints[0]),
        ("test", stored.test, again.test, prints[1]),
    ):
        alike = not isinstance(old.labels, Tensor) or _equal(old.labels, new.labels)
        same = alike and _fingerprints(new, again) == seen
        _require(same, f"read twice, {part} differs")


def _equal(old: Tensor, new: Tensor) -> bool:
    """Return whether labels are the same; numbers that nobody knows (NaN) are."""
    same_form = old.shape == new.shape and old.dtype == new.dtype
    return same_form and bool(((old == new) | (old != old) & (new != new)).all())


def _check_facts(dataset: DataSet, stored: Stored) -> None:
    """Hold what the class says before anything is read against what was read."""
    if dataset.classes:
        _require(stored.classes == dataset.classes, f"its classes are {stored.classes}")
    for part, most in dataset.most.items():
        count = len(getattr(stored, part).labels)
        _require(count <= most, f"{part} has {count} images, more than the {most} it says")
    if dataset.checksum is not None:
        _require(stored.checksum == dataset.checksum, f"its checksum is {stored.checksum}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Broken(otherwise)
