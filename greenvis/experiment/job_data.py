"""What a job's data mean for its model, its processes and its caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from greenvis import data
from greenvis.core import distributed
from greenvis.core.technique import Samples
from greenvis.errors import BadInput
from greenvis.experiment.jobs import Job
from greenvis.experiment.run_folder import CACHE_FOLDER

# of these, models have the data's classes and channels unless a recipe says otherwise
FOLLOWS_DATA = ("timm", "torchvision", "hf", "transformers", "diffusers", "plain")


def check_shares(job: Job, images: data.Data) -> None:
    """Raise BadInput where processes that train together could not share a job's batches, or what
    its techniques hold."""
    many, where = distributed.world_size(), job.recipe.where("arms", job.arm.name)
    if many == 1:
        return
    alone = {
        "a stream of tasks": job.arm.stream,
        "labels bought in rounds": job.arm.active,
        "by trials of structures": job.arm.search,
        "from images it makes": job.arm.synthesis,
    }
    if what := next((words for words, spec in alone.items() if spec is not None), ""):
        raise BadInput(
            f"{job.recipe.where('data', 'stream') if job.arm.stream else where}: a recipe learns "
            f"{what} as one process, and this is one of "
            f"{many}: start it without the launcher, or give each process its share in a loop of "
            "your own (gv.wrap, gv.track)"
        )
    apart = [t.name for arm in (job.arm, *job.arm.stages) for t in arm.techniques if t.rank_local]
    if apart:
        raise BadInput(
            f"{where}: each process holds a part of what '{apart[0]}' keeps, which one checkpoint "
            "cannot: start the recipe "
            "without the launcher, or run a loop of your own (gv.wrap, gv.track)"
        )
    number = (
        len(images.train)
        if job.arm.subset is None
        else job.arm.subset.per_class * len(images.classes)
    )
    for size in {arm.train.batch_size for arm in job.arm.stages or (job.arm,)}:
        last = min(size, number % size or size)
        if last < many:
            raise BadInput(
                f"{where}: batches of {size} out of {number} images end with one of {last}, which "
                f"{many} processes cannot "
                "share: choose another train.batch_size (it is that of all processes together)"
            )


def model_options(job: Job, images: data.Data) -> dict[str, Any]:
    """Return the model's options; of a library's model, classes (or numbers) and channels follow
    the data unless they are given."""
    spec = job.arm.model
    beside = spec.options.get("head") == "text"
    if images.words is not None and (beside or spec.ref.startswith(("plain/", "transformers/"))):
        text = {"tokens": images.words.size, "length": images.words.length}
        return {"in_chans": images.in_chans, **text, **spec.options}
    if spec.ref.split("/")[0] in FOLLOWS_DATA:
        split = images.train.split
        classes = split.labels.shape[1] if split.kind == "number" else len(images.classes)
        return {"num_classes": classes, "in_chans": images.in_chans, **spec.options}
    return spec.options


def samples_of(images: data.ImageSet, runs: Path) -> Callable[[int, Tensor], Samples]:
    """Return what tells techniques which samples of `images` they see; caches are shared by all
    recipes of `runs`.

    Its arguments: the epoch, counted from the first of all, and positions.
    """
    form = images.transform
    views = 1 if form.augment == "none" else form.views
    key, folder = images.key(), runs / CACHE_FOLDER
    return lambda epoch, at: Samples(
        folder, key, len(images), views, at, form.view(epoch) if views else 0
    )
