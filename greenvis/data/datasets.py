"""Data sets by name, as batches that any run can repeat: order and augmentation depend on seed,
epoch and index only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from greenvis.data import sources
from greenvis.data.sources import Lazy, Source, Split
from greenvis.data.transforms import AUGMENTS, Augment, Transform, mix
from greenvis.errors import BadInput, nearest

NAMES = ("digits", "fashion-mnist", "folder:PATH", "hf-datasets:PATH", "synthetic")
SIZES = {"digits": (1347, 450), "fashion-mnist": (60_000, 10_000), "synthetic": (100_000, 100_000)}
SYNTHETIC = {"train": 2000, "test": 500, "img_size": 32, "in_chans": 3}
# bytes a split may take once brought to size; above, images are brought to size batch by batch
IN_MEMORY = 512 * 2**20
STATISTICS_IMAGES = 2000  # enough for mean and deviation to 1 %, and half a second at 224 pixels


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images and labels, brought to size. An index is a position, or (epoch, position) where
    augmentation is wanted.

    targets: int64 (N,). ids: each image's row in its source, which its augmentation follows
    whatever the subset.
    """

    def __init__(self, split: Split, ids: Tensor, transform: Transform) -> None:
        self.split, self.ids, self.transform = split, ids, transform

    @property
    def targets(self) -> Tensor:
        """The labels, int64 (N,)."""
        return self.split.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = index if isinstance(index, tuple) else (0, index)
        x, y = self.batch([range(len(self))[position]], epoch)
        return x[0], int(y[0])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[tuple[Tensor, int]]:
        """Return many at once: what a plain DataLoader calls."""
        pairs = [i if isinstance(i, tuple) else (0, i) for i in indices]
        if len({epoch for epoch, _ in pairs}) != 1:
            return [self[p] for p in pairs]
        x, y = self.batch([position for _, position in pairs], pairs[0][0])
        return list(zip(x.unbind(), y.tolist(), strict=True))

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Return images and labels at some positions.

        Args:
            positions: int64 (B,).
            epoch: Which augmentation, from 0.

        Returns:
            x float32 (B, C, H, W), normalised, and y int64 (B,).
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        images = self.split.images
        if isinstance(images, Tensor):
            x = self.transform.fit(images.index_select(0, rows))
        else:
            x = torch.stack([self.transform.fit(images[i]) for i in rows.tolist()])
        x = self.transform.change(x, self.ids[rows].numpy(), epoch)
        return self.transform.normalise(x), self.split.labels[rows]

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset; its images keep their ids, and so their augmentation.

        Args:
            positions: int64 (n,).

        Returns:
            The subset, in this order.
        """
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return ImageSet(self.split.take(rows), self.ids[rows], self.transform)

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on: which images, and what is done
        to them."""
        return {
            "images": sources.sha256(
                [self.ids.numpy().tobytes(), self.split.labels.numpy().tobytes()]
            ),
            "transform": str(self.transform),
        }


@dataclass(frozen=True)
class Data:
    """A data set, ready: `train` is augmented as asked, `test` never. checksum: sha256 over what
    was read."""

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    checksum: str
    only: Sequence[str | int] | None = None
    held_out: ImageSet | None = (
        None  # of the training images, kept from all training, as the test shows them
    )

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


def check(
    name: str,
    *,
    train: int | None = None,
    test: int | None = None,
    held_out: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    augment: str = "none",
    views: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    folder: str | Path = ".",
    download: bool = False,
    classes: Sequence[str | int] | None = None,
) -> None:
    """Check a data set's settings without loading it: unknown names, missing files, sizes out of
    range.

    Takes the arguments of `load`.

    Raises:
        BadInput: For what `load` could not do.
    """
    kind, _, path = name.partition(":")
    kinds = {n.partition(":")[0] for n in NAMES}
    if kind not in kinds or (path != "") != (f"{kind}:PATH" in NAMES):
        raise BadInput(
            f"unknown data set '{name}'{nearest(name if kind not in kinds else kind, NAMES)}"
        )
    if augment not in AUGMENTS:
        raise BadInput(f"data: unknown augment '{augment}'{nearest(augment, AUGMENTS)}")
    if in_chans not in (None, 1, 3):
        raise BadInput(f"data: in_chans is {in_chans}; images have 1 (grey) or 3 (colour)")
    numbers = {
        "train": train,
        "test": test,
        "held_out": held_out,
        "img_size": img_size,
        "views": views,
    }
    for option, value in numbers.items():
        least = 4 if option == "img_size" else 1
        if value is not None and value < least:
            raise BadInput(f"data: {option} is {value}; it must be at least {least}")
    if views is not None and augment == "none":
        raise BadInput(
            "data: views changes nothing with augment: none, which has one; leave it out, or set "
            "augment"
        )
    if kind in SIZES:
        for option, value, most in zip(
            ("train", "test"), (_with_held_out(train, held_out), test), SIZES[kind], strict=True
        ):
            _check_count(name, option, value, most)
    if kind == "fashion-mnist":
        if not download:
            sources.fashion_folder(_resolve(folder, root) if root else None)
    elif root is not None or download:
        raise BadInput(
            f"data: `root` and `download` are for fashion-mnist; '{name}' knows where its images "
            "are"
        )
    if kind == "folder":
        images = _resolve(folder, path)
        sources.class_folders(images / "train" if (images / "train").is_dir() else images)
    elif kind == "hf-datasets":
        sources.hf_folder(_resolve(folder, path))


def load(
    name: str,
    *,
    train: int | None = None,
    test: int | None = None,
    held_out: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    augment: Augment = "none",
    views: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    folder: str | Path = ".",
    download: bool = False,
    classes: Sequence[str | int] | None = None,
    normalise: bool = True,
) -> Data:
    """Load a data set.

    Args:
        name: One of `NAMES`; PATH is relative to `folder`.
        train: Training images, drawn by class and seed (default: all).
        test: Test images, drawn by class and seed (default: all).
        held_out: Training images kept from `train`, in `Data.held_out`.
        img_size: Side in pixels to bring images to (default: their own; 224 for folders).
        in_chans: Channels to bring images to, 1 or 3 (default: their own; 3 for folders).
        augment: "crop" (pad by an eighth, crop back), "crop-flip", or "randaug" (RandAugment, Cubuk
            et al., 2020, then crop-flip).
        views: Repeat the augmentation after so many epochs, so that a teacher's outputs can be
            cached.
        seed: Of draws and augmentation.
        root: Folder of fashion-mnist's files, relative to `folder`.
        folder: What paths are relative to.
        download: Fetch fashion-mnist where it is not on the disk.
        classes: Only these, by name or number; their labels become 0, 1, … in this order.
        normalise: By channel; else pixels are 0 to 1.

    Returns:
        The training and test images.

    Raises:
        BadInput: As `check` does, and for files that cannot be read.
    """
    requested: dict[str, Any] = {
        "train": train,
        "test": test,
        "img_size": img_size,
        "in_chans": in_chans,
        "seed": seed,
    }
    location: dict[str, Any] = {"root": root, "folder": folder, "download": download}
    check(
        name,
        **requested,
        augment=augment,
        views=views,
        held_out=held_out,
        classes=classes,
        **location,
    )
    source = _read(
        name, requested, _resolve(folder, root) if root else None, Path(folder), download
    )
    numbers = (
        list(range(len(source.classes)))
        if classes is None
        else _class_indices(name, classes, source.classes)
    )
    form = Transform(
        img_size or source.img_size,
        in_chans or source.in_chans,
        augment=augment,
        views=views,
        seed=seed,
    )
    label_of = torch.full((len(source.classes),), -1)
    label_of[numbers] = torch.arange(len(numbers))
    rows: list[Tensor] = []
    splits: list[Split] = []
    for part, split in (("train", source.train), ("test", source.test)):
        available = torch.isin(split.labels, torch.tensor(numbers)).nonzero().squeeze(1)
        _check_count(
            name,
            part,
            _with_held_out(requested[part], held_out if part == "train" else None),
            len(available),
        )
        drawn = available[sources.stratified(split.labels[available], seed)]
        reserved = (held_out or 0) if part == "train" else 0
        rows += [drawn[: len(drawn) - reserved][: requested[part]].sort().values]
        rows += [drawn[len(rows[-1]) :][:reserved].sort().values] if reserved else []
        # grey is made colour batch by batch
        stored = replace(form, in_chans=min(form.in_chans, source.in_chans))
        for chosen in rows[len(splits) :]:
            subset = split.take(chosen)
            splits.append(_bring_to_size(Split(subset.images, label_of[subset.labels]), stored))
    form = _with_statistics(form, splits[0]) if normalise else form
    plain = replace(form, augment="none", views=None)
    train_set, test_set = ImageSet(splits[0], rows[0], form), ImageSet(splits[-1], rows[-1], plain)
    held_out_set = ImageSet(splits[1], rows[1], plain) if held_out else None
    return Data(
        name,
        train_set,
        test_set,
        tuple(source.classes[n] for n in numbers),
        source.checksum,
        classes,
        held_out_set,
    )


def _read(
    name: str, requested: dict[str, Any], root: Path | None, folder: Path, download: bool
) -> Source:
    kind, _, path = name.partition(":")
    if kind == "digits":
        return sources.digits()
    if kind == "fashion-mnist":
        return sources.fashion_mnist(root, download)
    if kind == "folder":
        return sources.image_folder(_resolve(folder, path))
    if kind == "hf-datasets":
        return sources.hf_datasets(_resolve(folder, path))
    return sources.synthetic(
        seed=requested["seed"], **{k: requested[k] or default for k, default in SYNTHETIC.items()}
    )


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


def _resolve(folder: str | Path, path: str | Path) -> Path:
    return (Path(folder) / Path(path).expanduser()).resolve()


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
    if len(split.labels) * form.in_chans * form.img_size**2 > IN_MEMORY:
        return split
    if isinstance(split.images, Lazy):
        images = torch.stack([form.fit(split.images[i]) for i in range(len(split.labels))])
    else:
        images = torch.cat([form.fit(part) for part in split.images.split(1024)])
    return Split(images.contiguous(), split.labels)


def _with_statistics(form: Transform, split: Split) -> Transform:
    """Return `form` with mean and standard deviation of the training images, by channel, of pixels
    in 0..1."""
    rows = torch.linspace(
        0, len(split.labels) - 1, min(len(split.labels), STATISTICS_IMAGES)
    ).long()
    plain = ImageSet(split, torch.arange(len(split.labels)), replace(form, augment="none"))
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


def order(length: int, *, epoch: int = 0, seed: int = 0, shuffle: bool = False) -> Tensor:
    """Return the positions in the order an epoch visits them: a function of the arguments alone.

    Args:
        length: Images.
        epoch: From 0.
        seed: Of the shuffling.
        shuffle: Whether the order is random.

    Returns:
        int64 (length,).
    """
    if not shuffle:
        return torch.arange(length)
    key = int(mix(np.array([epoch]), seed)[0] >> np.uint64(1))
    return torch.randperm(length, generator=torch.Generator().manual_seed(key))


class _Epoch(Dataset[Any]):
    """A data set at one epoch, which gives whole batches: (x, y), or (x, y, positions)."""

    def __init__(self, dataset: Dataset[Any], epoch: int, positions: bool) -> None:
        self.dataset, self.epoch, self.positions = dataset, epoch, positions

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, positions: list[int]) -> tuple[Any, ...]:
        if isinstance(self.dataset, ImageSet):
            batch = self.dataset.batch(positions, self.epoch)
        else:
            batch = tuple(default_collate([self.dataset[i] for i in positions]))
        return (*batch, torch.tensor(positions)) if self.positions else batch


def _identity(batch: Any) -> Any:
    return batch


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = False,
    start: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    positions: bool = False,
) -> DataLoader[Any]:
    """Return one epoch's loader.

    Order and augmentation depend on seed and epoch only, whatever the workers. torch's global
    random state is not touched.

    Args:
        dataset: Any map-style data set.
        batch_size: Samples per batch.
        epoch: From 0.
        seed: Of the shuffling.
        shuffle: Whether the order is random.
        start: Batches to pass over unread, so that a run resumes where it was.
        workers: Processes that load.
        drop_last: Whether a smaller last batch is left out.
        positions: Whether batches also say where their samples stand.

    Returns:
        A loader of (x float32 (B, C, H, W), y int64 (B,)); with `positions`, also int64 (B,).

    Raises:
        BadInput: For a batch size below 1 or a start below 0.
    """
    if batch_size < 1 or start < 0:
        raise BadInput(
            f"batches: batch_size is {batch_size} and start {start}; they must be at least 1 and 0"
        )
    length = len(dataset)  # type: ignore[arg-type]
    visits = order(length, epoch=epoch, seed=seed, shuffle=shuffle)[start * batch_size :].tolist()
    return DataLoader(
        _Epoch(dataset, epoch, positions),
        batch_sampler=BatchSampler(visits, batch_size, drop_last),
        collate_fn=_identity,
        num_workers=workers,
        generator=torch.Generator(),
    )
