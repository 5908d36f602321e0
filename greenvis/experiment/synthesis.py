"""Made images for scarce classes (`synthesis:` of an arm), in a phase of their own: all it takes to
make them is the arm's."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from greenvis import data
from greenvis.core import weights
from greenvis.data import layouts
from greenvis.data.image_set import Concat
from greenvis.data.splits import Boxes, Split
from greenvis.errors import BadInput
from greenvis.experiment import generators
from greenvis.experiment.recipe import SynthesisSpec
from greenvis.experiment.run_folder import SYNTHESIS_FILE
from greenvis.meters.track import Tracker

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared

MOST_VALUES = 3 * 64 * 64  # of an image: generators so small draw no larger one
MOST_CROPS = 200  # of a class
ROWS = 256  # images whose distances are held at once


def needed(images: data.ImageSet, spec: SynthesisSpec) -> dict[int, int]:
    """Return how many images each scarce class is short of, by class.

    Args:
        images: The training set.
        spec: Of the arm; of "layout", images that show a class count for it.

    Raises:
        BadInput: Where images have labels of another kind, or none is scarce.
    """
    if spec.by == "layout":
        counts = _showing(images)
    else:
        counts = torch.bincount(images.classes(f"synthesis by {spec.by}"))
    wanted = spec.per_class or int(counts.max())
    short = {c: wanted - n for c, n in enumerate(counts.tolist()) if 0 < n < wanted}
    if not short:
        raise BadInput(
            f"synthesis brings each class to {wanted} images, and none has fewer: ask for more "
            "(per_class), or leave it out"
        )
    return short


def planned(prepared: Prepared, spec: SynthesisSpec) -> dict[int, int]:
    """Return how many images are made, by class; by the first class shown, of a layout's file.

    Raises:
        BadInput: For what `add` could not make.
    """
    images = prepared.images.train
    channels, height, width = images.shape
    if spec.by in generators.GENERATORS and channels * height * width > MOST_VALUES:
        raise BadInput(
            f"synthesis by {spec.by} draws images of up to {MOST_VALUES:,} values, not "
            f"{channels * height * width:,}: set data.img_size"
        )
    if spec.layout is None:
        return needed(images, spec)
    first = [items[0].label for items in _layouts(prepared, spec, {})]
    return {c: first.count(c) for c in sorted({*first})}


def add(prepared: Prepared, spec: SynthesisSpec, tracker: Tracker) -> data.ImageSet:
    """Return the job's training images with those that are made for scarce classes.

    The file of drawn images lies beside the record. Recorded: how many were made of each class, and
    how near they come to real ones (`nearness`).
    """
    images = prepared.images.train
    with tracker.phase("synthesis"):
        short = planned(prepared, spec)
        made = MAKERS[spec.by](prepared, short, spec, tracker)
        fact: dict[str, Any] = {**spec.model_dump(), "made": {str(c): n for c, n in short.items()}}
        if spec.by != "oversample":
            fact |= nearness(images, made)
            tracker.images("synthetic", len(made))
    facts = {**prepared.images.facts(), "train": len(images) + len(made)}
    tracker.fact(synthesis=fact, data=facts)
    return Concat([images, made])


def nearness(images: data.ImageSet, made: data.ImageSet) -> dict[str, float]:
    """Return how near made images come to real ones of their class: what lies on a real image is
    remembered, not new.

    Args:
        images: The real ones.
        made: The others.

    Returns:
        "nearest_real": the median distance of a made image to the nearest real one of its class (of
        all, where images have no one class);
        "real_apart": that of a real image to the nearest other; "copies": how many made images lie
        nearer to a real one than a tenth of that. Distances are root mean squares of pixels, 0 to
        1.
    """
    own, between = [], []
    of_real, of_made = (_groups(one) for one in (images, made))
    for c in of_made.unique().tolist():
        real = _pixels(images, (of_real == c).nonzero().squeeze(1))
        drawn = _pixels(made, (of_made == c).nonzero().squeeze(1))
        scale = real.shape[1] ** 0.5
        own += [torch.cdist(part, real).min(1).values / scale for part in drawn.split(ROWS)]
        if len(real) > 1:
            apart = torch.cdist(real, real).fill_diagonal_(torch.inf)
            between.append(apart.min(1).values / scale)
    nearest = torch.cat(own)
    out = {"nearest_real": float(nearest.median())}
    if between:
        typical = float(torch.cat(between).median())
        out |= {"real_apart": typical, "copies": int((nearest < 0.1 * typical).sum())}
    return out


def _again(
    prepared: Prepared, short: Mapping[int, int], spec: SynthesisSpec, tracker: Tracker
) -> data.ImageSet:
    """Return images of scarce classes once more, each as often as the others of its class."""
    images, generator = prepared.images.train, torch.Generator().manual_seed(prepared.seed)
    rows: list[Tensor] = []
    for c, count in short.items():
        own = (images.targets == c).nonzero().squeeze(1)
        order = own[torch.randperm(len(own), generator=generator)]
        rows.append(order.repeat(-(-count // len(own)))[:count])
    return images.take(torch.cat(rows))


def _drawn(
    prepared: Prepared, short: Mapping[int, int], spec: SynthesisSpec, tracker: Tracker
) -> data.ImageSet:
    """Return images that a generator draws, or drew before: its file lies beside the record."""
    job = prepared.job
    file = None if prepared.short else job.folder / f"{job.inputs}-{SYNTHESIS_FILE}"
    if file is not None and file.exists():
        state = weights.read_state(file)
    else:
        labels = torch.cat([torch.full((n,), c) for c, n in short.items()])
        train = prepared.images.train
        pixels = _bytes(generators.draw(train, labels, spec, prepared.seed, tracker), train)
        state = {"images": pixels, "labels": labels}
        if file is not None:
            weights.write(file, state, {"by": spec.by, "seed": prepared.seed})
    return _new(Split(state["images"], state["labels"]), state["images"], prepared)


def _composed(
    prepared: Prepared, short: Mapping[int, int], spec: SynthesisSpec, tracker: Tracker
) -> data.ImageSet:
    """Return real images with crops of others pasted by a layout, and what the labels are then."""
    images, generator = prepared.images.train, torch.Generator().manual_seed(prepared.seed)
    plain, wanted = images.plain(), _layouts(prepared, spec, short)

    def row(at: int) -> tuple[Tensor, Any]:
        x, y = plain.batch([at])
        return _bytes(x, images)[0], y[0]

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    crops: dict[int, list[layouts.Crop]] = {i.label: [] for items in wanted for i in items}
    for at in torch.randperm(len(plain), generator=generator).tolist():
        for crop in layouts.cut(*row(at)):
            if len(crops.get(crop.label, ())) < MOST_CROPS and crop.label in crops:
                crops[crop.label].append(crop)
        if all(len(own) >= MOST_CROPS for own in crops.values()):
            break
    if none := [c for c, own in crops.items() if not own]:
        name = prepared.images.classes[none[0]]
        raise BadInput(f"synthesis by layout: no training image shows a '{name}' to paste")
    made = []
    for items in wanted:
        pasted = [(crops[i.label][draw(len(crops[i.label]))], i) for i in items]
        made.append(layouts.paste(*row(draw(len(plain))), pasted))
    pixels, targets = torch.stack([x for x, _ in made]), [y for _, y in made]
    labels = (
        torch.stack(targets)
        if images.split.kind == "mask"
        else Boxes(targets.__getitem__, range(len(targets)))
    )
    return _new(Split(pixels, labels), pixels, prepared)


def _layouts(
    prepared: Prepared, spec: SynthesisSpec, short: Mapping[int, int]
) -> list[list[layouts.Item]]:
    if spec.layout is None:
        return layouts.rule(short, torch.Generator().manual_seed(prepared.seed))
    path = prepared.job.recipe.folder / spec.layout
    return layouts.read(path, prepared.images.classes)


def _new(split: Split, pixels: Tensor, prepared: Prepared) -> data.ImageSet:
    """Return images as a set, with ids that no other set has."""
    first = int.from_bytes(hashlib.sha256(pixels.numpy().tobytes()).digest()[:5], "big")
    ids = first + torch.arange(len(split))
    return data.ImageSet(split, ids, prepared.images.train.transform)


def _showing(images: data.ImageSet) -> Tensor:
    """Return how many images show each class, the background 0 times, int64 (classes,).

    Raises:
        BadInput: Where labels are neither masks nor boxes.
    """
    if images.split.kind not in ("mask", "box"):
        raise BadInput(
            "synthesis by layout cuts objects out by their masks or boxes, and these images have "
            f"labels of kind {images.split.kind}: choose oversample, cvae, gan or diffusion"
        )
    counts: Counter[int] = Counter()
    plain = images.plain()
    for rows in torch.arange(len(plain)).split(ROWS):
        for y in plain.batch(rows)[1]:
            numbers = y if isinstance(y, Tensor) else y["labels"]
            counts.update(n for n in numbers.unique().tolist() if n > 0)
    return torch.tensor([counts[c] for c in range(max(counts, default=0) + 1)])


def _groups(images: data.ImageSet) -> Tensor:
    """Return the class of each image; 0 where images have no one class."""
    return images.targets if images.split.kind == "class" else torch.zeros(len(images)).long()


def _bytes(x: Tensor, images: data.ImageSet) -> Tensor:
    """Return normalised images as they are stored, uint8."""
    form = images.transform
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (form.mean, form.std))
    return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)


def _pixels(images: data.ImageSet, rows: Tensor) -> Tensor:
    """Return pixels of images, 0 to 1, float32 (n, values)."""
    plain = images.plain()
    return (
        _bytes(torch.cat([plain.batch(part)[0] for part in rows.split(ROWS)]), images).flatten(1)
        / 255.0
    )


# by name, what makes images
MAKERS: dict[
    str, Callable[[Prepared, Mapping[int, int], SynthesisSpec, Tracker], data.ImageSet]
] = {"oversample": _again, "layout": _composed, **dict.fromkeys(generators.GENERATORS, _drawn)}
