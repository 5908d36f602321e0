"""What a training is made of: parts, one after another. A data set is one, so is each experience of
a stream, and each stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from greenvis import data
from greenvis.core.feeds import STREAMS
from greenvis.core.technique import Experience, Samples, Technique
from greenvis.core.wrap import Wrapped
from greenvis.data.streams import Stream
from greenvis.errors import BadInput
from greenvis.experiment import knn, roles
from greenvis.experiment.evaluate import Evaluator
from greenvis.experiment.job_data import samples_of
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.track import Tracker
from greenvis.tasks.base import Task

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a training, with an optimizer and a schedule of its own.

    Attributes:
        spec: How it trains.
        task: What the model answers.
        batches: (epoch, start) -> the epoch's batches (x, y) from number `start` on, in an order
            that (seed, epoch) fixes; with `samples`, of (x, y, positions). Several processes
            train on their shares of each batch, which must come in a DataLoader.
        length: Batches an epoch.
        evaluator: What says how good the model is.
        samples: (epoch, positions) -> which samples those are.
        domains: Of each training image, int64 (N,), where there are several: `batches` then gives
            (x, y, positions).
        phase: What its epochs are metered below.
        techniques: What the model is wrapped with from here on; None: what it is wrapped with.
        stage: Its name, where it is one; "" where not.
        loss: Of (outputs, y); None: the task's.
        index: Of the experience it trains on; None where it is no stream's.
        experience: What techniques hear of it; None where they hear nothing.
        finished: Its (x, y) once more, for techniques to go through at its end.
        images: What techniques may choose from for an epoch (`visit`), whose choice `batches` then
            takes as `visits`; None where nothing can be chosen.
        feeds: Second streams of images, by name (`core.feeds.STREAMS`).
        restart: Whether it begins with the weights that the first part began with.
        count: Records what labels it takes, of the model with the techniques on it.
        begin: What it is when it begins, asked of the model as the part before left it; None: as it
            stands.
        round: Of labels bought, from 1; 0 where none are.
    """

    spec: TrainSpec
    task: Task
    batches: Callable[..., Iterable[Any]]
    length: int
    evaluator: Evaluator
    samples: Callable[[int, Tensor], Samples] | None = None
    domains: Tensor | None = None
    phase: str = "train"
    techniques: Callable[[], Sequence[Technique]] | None = None
    stage: str = ""
    loss: Callable[[Tensor, Any], Tensor] | None = None
    index: int | None = None
    experience: Experience | None = None
    finished: Iterable[Any] = ()
    images: data.ImageSet | None = None
    feeds: Mapping[str, data.ImageSet] = field(default_factory=dict)
    restart: bool = False
    count: Callable[[Wrapped], None] = lambda live: None
    begin: Callable[[Wrapped], Part] | None = None
    round: int = 0


class Repeatable:
    """Batches (x, y), as often as they are gone through, in the same order.

    Args:
        loader: Returns a loader of (x, y, …).
        length: Batches it yields.
    """

    def __init__(self, loader: Callable[[], Iterable[Any]], length: int) -> None:
        self._loader, self._length = loader, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return ((x, y) for x, y, *_ in self._loader())


def evaluator(prepared: Prepared) -> Evaluator:
    """Return what says how good a job's model is."""
    job, images, stream = prepared.job, prepared.images, prepared.stream
    short, spec = prepared.short, job.arm.train

    def load(images: data.ImageSet) -> Iterable[Any]:
        batches = data.batches(images, job.arm.test_batch, workers=spec.workers)
        return batches if short is None else short.take(batches, short.tests)

    own = None if stream is None else stream.tests
    return Evaluator(
        prepared.task,
        partial(load, images.test),
        None if images.held_out is None else partial(load, images.held_out),
        untrained=spec.epochs == 0
        and bool(job.arm.model.starts)
        and job.arm.model.classifier == "new",
        stream=stream,
        tests=None if own is None else lambda task: load(own[task][1]),
    )


def feeds_of(images: data.Data) -> dict[str, data.ImageSet]:
    """Return the second streams of images that a data set has, by name."""
    sets = {name: getattr(images, name) for name in STREAMS}
    return {name: one for name, one in sets.items() if one is not None}


def check_feeds(live: Wrapped, feeds: Mapping[str, data.ImageSet]) -> None:
    """Raise BadInput where a technique wants a stream of images that is not there."""
    for name, technique in live.wanted.items():
        if name not in feeds:
            raise BadInput(
                f"'{technique}' draws from a stream '{name}', and this data has none: set "
                f"{STREAMS[name]}"
            )


def check_visits(live: Wrapped, chosen: bool) -> None:
    """Raise BadInput where a technique chooses images, and nothing can be chosen."""
    if not chosen and (users := live.using("visit")):
        raise BadInput(
            f"'{users[0][0].name}' chooses the images of each epoch, which a stream of tasks gives "
            "in an order of its own: leave one of them out"
        )


def check_wants(live: Wrapped, part: Part) -> None:
    """Raise BadInput where a technique goes by domains or by images held out, and there are
    none."""
    if part.domains is None and (users := live.using("by_domain")):
        raise BadInput(
            f"'{users[0][0].name}' compares the domains of training, and this data has one: name "
            "two or more in `domains: {train: [...]}` below `data`"
        )
    if part.evaluator.held_out is None and (users := live.using("assesses")):
        raise BadInput(
            f"'{users[0][0].name}' goes by the loss on images held out, and there are none: set "
            "data.held_out"
        )


def trained_on(prepared: Prepared, tracker: Tracker) -> data.ImageSet:
    """Return the images that a job's epochs go through."""
    arm = prepared.job.arm
    stream = next((t.trains_on for t in arm.techniques if t.trains_on), arm.on)
    beside = feeds_of(prepared.images).get(stream)
    return prepared.training(tracker) if beside is None else beside


def of_data(prepared: Prepared, tracker: Tracker) -> Part:
    """Return the training on a data set, or on what is chosen of it."""
    return of_images(prepared, trained_on(prepared, tracker), tracker)


def of_images(prepared: Prepared, images: data.ImageSet, tracker: Tracker) -> Part:
    """Return the training on some of the job's images."""
    spec, short = prepared.job.arm.train, prepared.short
    stage = prepared.job.arm.stage
    caches = prepared.job.caches(prepared.runs) if short is None else short.caches
    judge = evaluator(prepared)
    domains = images.domains if len(images.domains.unique()) > 1 else None
    if short is None and images.split.kind not in ("mask", "box"):
        asked = prepared.images.train if prepared.job.arm.on else images
        known = roles.neighbours(asked, prepared.images.held_out)
        bank = partial(data.batches, known, max(spec.batch_size, 256), shuffle=True)
        judge = replace(judge, neighbours=lambda model, on: knn.score(model, bank(), on))

    def batches(epoch: int, start: int, visits: Tensor | None = None) -> Iterable[Any]:
        loader = data.batches(
            images,
            spec.batch_size,
            epoch=epoch,
            start=start,
            seed=prepared.seed,
            shuffle=True,
            workers=spec.workers,
            positions=caches is not None or domains is not None,
            visits=visits,
        )
        return loader if short is None else short.take(loader, short.batches)

    epoch_length = math.ceil(len(images) / spec.batch_size)
    return Part(
        spec=spec,
        task=prepared.task,
        batches=batches,
        length=min(epoch_length, (short and short.batches) or epoch_length),
        evaluator=judge,
        # of a mixed image, nothing is kept
        samples=None if caches is None or roles.mixes(spec) else samples_of(images, caches),
        domains=domains,
        phase=f"train/{stage}" if stage else "train",
        techniques=prepared.techniques,
        stage=stage,
        count=lambda live: roles.count(prepared, live, tracker),
        images=images,
        feeds=feeds_of(prepared.images),
    )


def of_stream(prepared: Prepared, stream: Stream, tracker: Tracker) -> list[Part]:
    """Return the training on a stream, an experience after another."""
    spec, task, judge = prepared.job.arm.train, prepared.task, evaluator(prepared)
    assert prepared.job.arm.stream is not None
    restart, caches = prepared.job.arm.stream.restart, prepared.job.caches(prepared.runs)

    def part(index: int, images: data.ImageSet) -> Part:
        load = partial(
            stream.batches, index, spec.batch_size, seed=prepared.seed, workers=spec.workers
        )
        length = math.ceil(len(images) / spec.batch_size)
        return Part(
            spec=spec,
            task=task,
            batches=lambda epoch, start: load(epoch=epoch, start=start),
            length=length,
            evaluator=judge,
            samples=samples_of(images, caches),
            phase=f"train/task{index + 1}",
            techniques=prepared.techniques if index == 0 else None,
            loss=lambda outputs, y: task.loss(stream.masked(index, outputs, y), y),
            index=index,
            experience=stream.experiences[index] if stream.has_task_boundaries else None,
            finished=Repeatable(load, length),
            feeds={**feeds_of(prepared.images), "train": images},
            restart=restart,
            count=lambda live: roles.count(prepared, live, tracker),
        )

    return [part(index, images) for index, images in enumerate(stream.train)]
