"""Made images for scarce classes (`synthesis:` of an arm), in a phase of their own: all it takes to
make them is the arm's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from greenvis import data
from greenvis.core import weights
from greenvis.data.image_set import Concat
from greenvis.data.splits import Split
from greenvis.errors import BadInput
from greenvis.experiment.jobs import SYNTHESIS_FILE
from greenvis.experiment.recipe import SynthesisSpec
from greenvis.meters.track import Tracker
from greenvis.models.vae import Vae

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared

MOST_VALUES = 3 * 64 * 64  # of an image: a perceptron draws no larger one worth training on
ROWS = 256  # images whose distances are held at once


def needed(images: data.ImageSet, spec: SynthesisSpec) -> dict[int, int]:
    """Return how many images each scarce class is short of, by class.

    Args:
        images: The training set.
        spec: Of the arm.

    Raises:
        BadInput: Where images have no classes, or none is scarce.
    """
    counts = torch.bincount(images.classes("synthesis"))
    wanted = spec.per_class or int(counts.max())
    short = {c: wanted - n for c, n in enumerate(counts.tolist()) if 0 < n < wanted}
    if not short:
        raise BadInput(
            f"synthesis brings each class to {wanted} images, and none has fewer: ask for more "
            "(per_class), or leave it out"
        )
    return short


def check(images: data.ImageSet, spec: SynthesisSpec) -> None:
    """Raise BadInput for what `add` could not make."""
    needed(images, spec)
    channels, height, width = images.shape
    if spec.by == "cvae" and channels * height * width > MOST_VALUES:
        raise BadInput(
            f"synthesis by cvae draws images of up to {MOST_VALUES:,} values, not "
            f"{channels * height * width:,}: set data.img_size"
        )


def add(prepared: Prepared, spec: SynthesisSpec, tracker: Tracker) -> data.ImageSet:
    """Return the job's training images with those that are made for scarce classes.

    The file of made images lies beside the record. Recorded: how many were made of each class, and
    how near they come to real ones (`nearness`).
    """
    images, job = prepared.images.train, prepared.job
    short = needed(images, spec)
    file = None if prepared.short else job.folder / f"{job.inputs}-{SYNTHESIS_FILE}"
    with tracker.phase("synthesis"):
        made = _made(images, short, spec, prepared.seed, tracker, file)
        fact: dict[str, Any] = {**spec.model_dump(), "made": {str(c): n for c, n in short.items()}}
        if made is not None:
            fact |= nearness(images, made)
    facts = {**prepared.images.facts(), "train": len(images) + sum(short.values())}
    tracker.fact(synthesis=fact, data=facts)
    if made is None:
        return Concat([images, _again(images, short, prepared.seed)])
    tracker.images("synthetic", len(made))
    return Concat([images, made])


def nearness(images: data.ImageSet, made: data.ImageSet) -> dict[str, float]:
    """Return how near made images come to real ones of their class: what lies on a real image is
    remembered, not new.

    Args:
        images: The real ones.
        made: The others.

    Returns:
        "nearest_real": the median distance of a made image to the nearest real one of its class;
        "real_apart": that of a real image to the nearest other; "copies": how many made images lie
        nearer to a real one than a tenth of that. Distances are root mean squares of pixels, 0 to
        1.
    """
    own, between = [], []
    for c in made.targets.unique().tolist():
        real = _pixels(images, (images.targets == c).nonzero().squeeze(1))
        drawn = _pixels(made, (made.targets == c).nonzero().squeeze(1))
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


def _made(
    images: data.ImageSet,
    short: Mapping[int, int],
    spec: SynthesisSpec,
    seed: int,
    tracker: Tracker,
    file: Path | None,
) -> data.ImageSet | None:
    """Return new images of each class, or None where known ones are shown again."""
    if spec.by == "oversample":
        return None
    if file is not None and file.exists():
        state = weights.read_state(file)
    else:
        labels = torch.cat([torch.full((n,), c) for c, n in short.items()])
        pixels = MAKERS[spec.by](images, labels, spec, seed, tracker)
        state = {"images": pixels, "labels": labels}
        if file is not None:
            weights.write(file, state, {"by": spec.by, "seed": seed})
    # no other set has these ids
    first = int.from_bytes(hashlib.sha256(state["images"].numpy().tobytes()).digest()[:5], "big")
    ids = first + torch.arange(len(state["labels"]))
    return data.ImageSet(Split(state["images"], state["labels"]), ids, images.transform)


def _again(images: data.ImageSet, short: Mapping[int, int], seed: int) -> data.ImageSet:
    """Return images of scarce classes once more, each as often as the others of its class."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for c, count in short.items():
        own = (images.targets == c).nonzero().squeeze(1)
        order = own[torch.randperm(len(own), generator=generator)]
        rows.append(order.repeat(-(-count // len(own)))[:count])
    return images.take(torch.cat(rows))


def _cvae(
    images: data.ImageSet, labels: Tensor, spec: SynthesisSpec, seed: int, tracker: Tracker
) -> Tensor:
    """Train a conditional variational autoencoder on all classes, and draw images of `labels`:
    uint8 (n, C, H, W)."""
    plain = images.plain()
    channels, side, _ = images.shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Vae(int(images.targets.max()) + 1, channels, side)
        optimizer = torch.optim.Adam(model.parameters(), lr=spec.lr)
        for epoch in range(spec.epochs):
            loader = data.batches(plain, spec.batch_size, epoch=epoch, seed=seed, shuffle=True)
            for x, y in tracker.steps(loader, phase=None, progress=False):
                loss = model(x, y)["loss"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        with torch.no_grad():
            drawn = torch.cat([model.sample(part) for part in labels.split(ROWS)])
    return _bytes(drawn, images)


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


# by name, what makes images of classes: (images, labels, spec, seed, tracker) -> uint8 (n, C, H, W)
MAKERS: dict[str, Callable[[data.ImageSet, Tensor, SynthesisSpec, int, Tracker], Tensor]] = {
    "cvae": _cvae
}
