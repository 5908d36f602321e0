"""From what a recipe says to images that are ready: drawn by seed, brought to size, normalised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greenvis.data import dataset
from greenvis.data import images as files
from greenvis.data.assignment import assign, changed, class_numbers
from greenvis.data.changes import PLAIN, SEVERITIES, SORTED, in_order, parse
from greenvis.data.image_set import Concat, ImageSet
from greenvis.data.roles import Data
from greenvis.data.spec import DataSpec
from greenvis.data.splits import UNKNOWN, Boxes, Lazy, Split, sha256, stratified
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput, nearest

# bytes a split may take once brought to size; above, images are brought to size batch by batch
IN_MEMORY = 512 * 2**20
OFFSET_BITS = 32  # of ids of images of further domains
FOLDER_IDS = 1 << 52  # the first id of images of a folder without labels
UNLABELED = ("unlabeled", "target")
STATISTICS_IMAGES = 2000  # enough for mean and deviation to 1 %, and half a second at 224 pixels


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
        if part in chosen.most:
            _check_count(spec.name, part, count, chosen.most[part])
    for each in _own_domains(chosen).values() or (chosen,):
        each.check()
    below = spec.unlabeled_folder
    if below is not None and not (path := chosen.resolve(below)).is_dir():
        raise BadInput(f"data: unlabeled: no folder at {path}")


def load(spec: DataSpec, folder: str | Path = ".", seed: int = 0) -> Data:
    """Load a data set, its images in their roles.

    Args:
        spec: What the recipe says.
        folder: What paths in it are relative to.
        seed: Of the run, by which it is drawn who has a label.

    Returns:
        The training and test images; their normalisation is that of the training images.

    Raises:
        BadInput: As `check` does, and for files that cannot be read.
    """
    return assign(read(spec, folder), spec, seed)


def read(spec: DataSpec, folder: str | Path = ".") -> Data:
    """Read a data set, all of its training images labelled and shown as they are; see `load`."""
    check(spec, folder)
    chosen = dataset.find(spec, folder)
    own = _own_domains(chosen)
    images = _of_domains(chosen, own) if own else _read(chosen)
    if spec.unlabeled_folder is not None:
        images = _beside(images, chosen.resolve(spec.unlabeled_folder))
    if not spec.normalise:
        return images
    form = _with_statistics(images.train)
    sets = {role: getattr(images, role) for role in ("train", "test", "held_out", *UNLABELED)}
    shown = {role: part and part.shown(form) for role, part in sets.items()}
    tests = {name: part.shown(form) for name, part in images.tests.items()}
    return replace(images, **shown, tests=tests)


def _own_domains(chosen: dataset.DataSet) -> dict[str, dataset.DataSet]:
    """Return the domains that the recipe names and the data set itself has.

    Raises:
        BadInput: For a name that is neither such a domain nor a change.
    """
    domains = chosen.spec.domains
    if domains is None:
        return {}
    tests = [name.removeprefix(SORTED) for name in domains.test]
    names = [*domains.train, *domains.unlabeled, *domains.target, *tests]
    own: dict[str, dataset.DataSet] = {}
    for name in dict.fromkeys(names):
        if parse(name) is None:
            if (shown := chosen.domain(name)) is None:
                raise BadInput(
                    f"data: '{chosen.spec.name}' has no domain '{name}'"
                    f"{nearest(name.partition(':')[0], [PLAIN, *SEVERITIES])}"
                )
            own[name] = shown
    for role in ("train", "target"):
        count = len([name for name in getattr(domains, role) if name in own])
        if 0 < count < len(getattr(domains, role)):
            raise BadInput(
                f"data: domains.{role} names domains of the data set or changes of it, not both"
            )
    if any(name in own for name in domains.unlabeled):
        raise BadInput(
            "data: domains.unlabeled names changes of the training images; those of a domain of "
            "the data set are domains.target"
        )
    return own


def _of_domains(chosen: dataset.DataSet, own: dict[str, dataset.DataSet]) -> Data:
    """Read the domains of a data set's own, each with its own split into train and test."""
    domains = chosen.spec.domains
    assert domains is not None
    parts = {
        name: _read(each, offset << OFFSET_BITS)
        for offset, (name, each) in enumerate(own.items(), 1)
    }
    trained = [parts[name] for name in domains.train if name in own] or [_read(chosen)]
    base = trained[0]
    for name, part in parts.items():
        if part.classes != base.classes:
            raise BadInput(
                f"data: domain '{name}' has other classes than {trained[0].name}; choose those "
                "they share with `classes`"
            )
    tests = {
        name: in_order(parts[plain].test, name)
        if (plain := name.removeprefix(SORTED)) in own
        else changed(base.test, name)
        for name in domains.test
    }
    held_out = [part.held_out for part in trained if part.held_out is not None]
    unlabeled = [part.unlabeled for part in trained if part.unlabeled is not None]
    target = [parts[name].train for name in domains.target if name in own]
    every = [base, *parts.values()]
    return replace(
        base,
        name=chosen.spec.name,
        train=_joined([part.train for part in trained]),
        test=next(iter(tests.values())),
        checksum=sha256([part.checksum.encode() for part in every]),
        held_out=_joined(held_out) if held_out else None,
        unlabeled=_joined(unlabeled) if unlabeled else None,
        target=_joined(target) if target else None,
        tests=tests,
    )


def _beside(images: Data, folder: Path) -> Data:
    """Return a data set whose images without a label are those below a folder."""
    paths, broken = files.readable(folder)
    form = images.train.transform
    split = Split(files.lazy(paths), torch.full((len(paths),), UNKNOWN))
    ids = FOLDER_IDS + torch.arange(len(paths))
    names = (c for path in paths for c in (str(path.relative_to(folder)).encode(), path))
    return replace(
        images,
        unlabeled=ImageSet(_bring_to_size(split, form), ids, form),
        checksum=sha256([images.checksum.encode(), sha256(names).encode()]),
        skipped=(*images.skipped, *broken),
    )


def _joined(parts: list[ImageSet]) -> ImageSet:
    return parts[0] if len(parts) == 1 else Concat(parts)


def _read(chosen: dataset.DataSet, first_id: int = 0) -> Data:
    """Read a data set, unchanged and not yet normalised; its images' ids begin at `first_id`."""
    spec, stored = chosen.spec, chosen.read()
    numbers = list(range(len(stored.classes)))
    if spec.classes is not None:
        numbers = class_numbers(spec.name, spec.classes, stored.classes)
        if len(numbers) < 2:
            raise BadInput(f"data: classes takes two or more, each once; got {list(spec.classes)}")
        if stored.train.kind not in ("class", "multilabel"):
            raise BadInput(f"data: classes chooses images by class, and '{spec.name}' has none")
    form = Transform(
        spec.img_size or stored.img_size, spec.in_chans or stored.in_chans, seed=spec.seed
    )
    # grey is made colour batch by batch
    as_stored = replace(form, in_chans=min(form.in_chans, stored.in_chans))

    def relabel(split: Split) -> Any:
        if spec.classes is None or split.kind not in ("class", "multilabel"):
            return split.labels
        if split.kind == "multilabel":
            return split.labels[:, numbers]
        label_of = torch.full((len(stored.classes) + 1,), UNKNOWN)  # the last is that of -1
        label_of[numbers] = torch.arange(len(numbers))
        return label_of[split.labels]

    def ready(split: Split, rows: Tensor) -> ImageSet:
        subset = split.take(rows)
        subset = _bring_to_size(replace(subset, labels=relabel(subset)), as_stored)
        return ImageSet(subset, first_id + rows, form)

    train_rows, held_out_rows = _draw(spec, stored.train, numbers, "train", spec.held_out or 0)
    test_rows, _ = _draw(spec, stored.test, numbers, "test", 0)
    unlabeled = (~stored.train.known).nonzero().squeeze(1)
    return Data(
        spec.name,
        ready(stored.train, train_rows),
        ready(stored.test, test_rows),
        tuple(stored.classes[n] for n in numbers),
        stored.checksum,
        spec.classes,
        held_out=ready(stored.train, held_out_rows) if spec.held_out else None,
        unlabeled=ready(stored.train, unlabeled) if spec.unlabeled and len(unlabeled) else None,
        skipped=stored.skipped,
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


def _with_statistics(images: ImageSet) -> Transform:
    """Return how images are shown, with their mean and standard deviation by channel, of pixels in
    0..1."""
    form = images.transform
    rows = torch.linspace(0, len(images) - 1, min(len(images), STATISTICS_IMAGES)).long()
    total, squares = torch.zeros(2, form.in_chans, dtype=torch.float64)
    for part in rows.split(256):
        x, _ = images.batch(part)
        total += x.mean((2, 3)).double().sum(0)
        squares += x.square_().mean((2, 3)).double().sum(0)
    mean = total / len(rows)
    std = (squares / len(rows) - mean.square()).clamp_min(1e-6).sqrt()
    return replace(
        form,
        mean=tuple(round(v, 4) for v in mean.tolist()),
        std=tuple(round(v, 4) for v in std.tolist()),
    )
