"""From what a recipe says to images that are ready: drawn by seed, brought to size, normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greenvis.data import dataset
from greenvis.data.image_set import ImageSet
from greenvis.data.spec import DataSpec
from greenvis.data.splits import UNKNOWN, Boxes, Lazy, Split, stratified
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput, nearest

# bytes a split may take once brought to size; above, images are brought to size batch by batch
IN_MEMORY = 512 * 2**20
STATISTICS_IMAGES = 2000  # enough for mean and deviation to 1 %, and half a second at 224 pixels


@dataclass(frozen=True)
class Data:
    """A data set, ready: `train` is augmented as asked, `test` never.

    Attributes:
        name: As in the recipe.
        train: What is trained on with labels.
        test: What no training sees; the first of `tests`, where there are several.
        classes: Names, by label.
        checksum: sha256 over what was read.
        only: The classes that the recipe chose, as it wrote them.
        held_out: Training images that no training sees, to choose on; shown as the test is.
        unlabeled: Images to learn from without labels, all -1; no image of `train`.
        target: Images of the domain to adapt to, likewise.
        tests: Tests by name; empty where there is one without a name.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    checksum: str
    only: Sequence[str | int] | None = None
    held_out: ImageSet | None = (
        None  # of the training images, kept from all training, as the test shows them
    )
    unlabeled: ImageSet | None = None
    target: ImageSet | None = None
    tests: Mapping[str, ImageSet] = field(default_factory=dict)

    @property
    def img_size(self) -> int:
        """Side of the images in pixels."""
        return self.train.transform.img_size

    @property
    def in_chans(self) -> int:
        """Channels: 1 or 3."""
        return self.train.transform.in_chans

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model trained on it knows (`models.describe`)."""
        form = self.train.transform
        return {"mean": form.mean, "std": form.std, "classes": self.classes}

    def facts(self) -> dict[str, Any]:
        """Return what a run record says about its data; `classes`, `train` and `test` are
        counts."""
        t = self.train.transform
        counts = {"train": len(self.train), "test": len(self.test), "classes": len(self.classes)}
        form = {
            "img_size": t.img_size,
            "in_chans": t.in_chans,
            "augment": t.augment,
            "views": t.views,
        }
        return {
            "name": self.name,
            "checksum": self.checksum,
            **counts,
            **form,
            "mean": list(t.mean),
            "std": list(t.std),
            "seed": t.seed,
            "only": None if self.only is None else list(self.only),
            **({"held_out": len(self.held_out)} if self.held_out is not None else {}),
        }


def check(spec: DataSpec, folder: str | Path = ".") -> None:
    """Check what a recipe asks for without loading it: unknown names, missing files, too many
    images.

    Args:
        spec: What the recipe says.
        folder: What paths in it are relative to.

    Raises:
        BadInput: For what `load` could not do.
    """
    chosen = dataset.find(spec, folder)
    for part, count in (("train", _with_held_out(spec.train, spec.held_out)), ("test", spec.test)):
        if part in chosen.size:
            _check_count(spec.name, part, count, chosen.size[part])
    chosen.check()


def load(spec: DataSpec, folder: str | Path = ".") -> Data:
    """Load a data set.

    Args:
        spec: What the recipe says.
        folder: What paths in it are relative to.

    Returns:
        The training and test images; their normalisation is that of the training images.

    Raises:
        BadInput: As `check` does, and for files that cannot be read.
    """
    check(spec, folder)
    stored = dataset.find(spec, folder).read()
    numbers = list(range(len(stored.classes)))
    if spec.classes is not None:
        numbers = _class_indices(spec.name, spec.classes, stored.classes)
        if stored.train.kind not in ("class", "multilabel"):
            raise BadInput(f"data: classes chooses images by class, and '{spec.name}' has none")
    form = Transform(
        spec.img_size or stored.img_size,
        spec.in_chans or stored.in_chans,
        augment=spec.augment,
        views=spec.views,
        seed=spec.seed,
    )
    # grey is made colour batch by batch
    as_stored = replace(form, in_chans=min(form.in_chans, stored.in_chans))

    def relabel(split: Split) -> Any:
        if split.kind == "multilabel":
            return split.labels[:, numbers]
        if split.kind != "class":
            return split.labels
        label_of = torch.full((len(stored.classes),), UNKNOWN)
        label_of[numbers] = torch.arange(len(numbers))
        return label_of[split.labels]

    def ready(split: Split, rows: Tensor) -> Split:
        subset = split.take(rows)
        return _bring_to_size(replace(subset, labels=relabel(subset)), as_stored)

    train_rows, held_out_rows = _draw(spec, stored.train, numbers, "train", spec.held_out or 0)
    test_rows, _ = _draw(spec, stored.test, numbers, "test", 0)
    train = ready(stored.train, train_rows)
    form = _with_statistics(form, train) if spec.normalise else form
    plain = replace(form, augment="none", views=None)
    held_out = None
    if spec.held_out:
        held_out = ImageSet(ready(stored.train, held_out_rows), held_out_rows, plain)
    return Data(
        spec.name,
        ImageSet(train, train_rows, form),
        ImageSet(ready(stored.test, test_rows), test_rows, plain),
        tuple(stored.classes[n] for n in numbers),
        stored.checksum,
        spec.classes,
        held_out,
    )


def _draw(
    spec: DataSpec, split: Split, numbers: list[int], part: str, reserved: int
) -> tuple[Tensor, Tensor]:
    """Return the rows to show, by class and seed, and as many others as are to be reserved; of
    images whose label is known and chosen."""
    requested = spec.train if part == "train" else spec.test
    groups = split.groups
    eligible = torch.isin(groups, torch.tensor(numbers)) if split.kind == "class" else groups >= 0
    available = eligible.nonzero().squeeze(1)
    asked = _with_held_out(requested, reserved or None)
    _check_count(spec.name, part, asked, len(available))
    drawn = available[stratified(groups[available], spec.seed)]
    shown = drawn[: len(drawn) - reserved][:requested]
    return shown.sort().values, drawn[len(shown) :][:reserved].sort().values


def _class_indices(name: str, requested: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """Return the classes asked for as numbers."""
    numbers = []
    for one in requested:
        if one in names or (isinstance(one, int) and 0 <= one < len(names)):
            numbers.append(one if isinstance(one, int) else names.index(one))
        else:
            known = (
                f"; '{name}' has {len(names)}, numbered from 0"
                if isinstance(one, int)
                else nearest(one, names)
            )
            raise BadInput(f"data: no class {one!r}{known}")
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise BadInput(f"data: classes takes two or more, each once; got {list(requested)}")
    return numbers


def _with_held_out(requested: int | None, held_out: int | None) -> int | None:
    """How many images are asked for in all; of all there are, one at least beside those held
    out."""
    return requested if held_out is None else (requested or 1) + held_out


def _check_count(name: str, part: str, requested: int | None, available: int) -> None:
    if requested is not None and requested > available:
        raise BadInput(
            f"data: {part} asks for {requested} images, but '{name}' has {available}; ask for "
            f"fewer or leave `{part}` out"
        )


def _bring_to_size(split: Split, form: Transform) -> Split:
    """Decode and resize once where the result fits in memory: work that is not repeated each epoch
    costs nothing there."""
    if len(split) * form.in_chans * form.img_size**2 > IN_MEMORY:
        return split
    if isinstance(split.images, Lazy):
        images = torch.stack([form.fit(split.images[i]) for i in range(len(split))])
    else:
        images = torch.cat([form.fit(part) for part in split.images.split(1024)])
    return replace(split, images=images.contiguous(), labels=_labels_to_size(split, form))


def _labels_to_size(split: Split, form: Transform) -> Tensor | Lazy:
    """Return what lies on the images (masks, boxes) as large as those are now."""
    labels = split.labels
    if isinstance(labels, Tensor):
        return form.fit_mask(labels) if split.kind == "mask" else labels
    if split.kind == "mask":
        return torch.stack([form.fit_mask(labels[i]) for i in range(len(labels))])
    return Boxes([form.fit_boxes(labels[i]) for i in range(len(labels))].__getitem__,
                 range(len(labels)))  # fmt: skip


def _with_statistics(form: Transform, split: Split) -> Transform:
    """Return `form` with mean and standard deviation of the training images, by channel, of pixels
    in 0..1."""
    rows = torch.linspace(0, len(split) - 1, min(len(split), STATISTICS_IMAGES)).long()
    plain = ImageSet(split, torch.arange(len(split)), replace(form, augment="none"))
    total, squares = torch.zeros(2, form.in_chans, dtype=torch.float64)
    for part in rows.split(256):
        x, _ = plain.batch(part)
        total += x.mean((2, 3)).double().sum(0)
        squares += x.square_().mean((2, 3)).double().sum(0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_min(1e-6).sqrt()
    return replace(
        form,
        mean=tuple(round(v, 4) for v in mean.tolist()),
        std=tuple(round(v, 4) for v in std.tolist()),
    )
