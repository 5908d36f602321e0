"""What a job may make of its images' roles, and what its labels are counted as."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenvis import data
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput
from greenvis.experiment.evaluate import evaluate
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.track import Tracker

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared


def mixes(spec: TrainSpec) -> bool:
    """Whether a training mixes its images in pairs."""
    return spec.mixup is not None or spec.cutmix is not None


def check(prepared: Prepared, live: Wrapped) -> None:
    """Refuse a training that would learn from what nobody knows, or see what is yet to come.

    Args:
        prepared: The job.
        live: Its model with the arm's techniques, or with none where it has stages.

    Raises:
        BadInput: With what to do.
    """
    images, job = prepared.images, prepared.job
    if mixes(job.arm.train) and (live.pretext or prepared.stream is not None):
        raise BadInput(
            "train.mixup and train.cutmix mix images with their labels: a pretext has none, and "
            "buffers of a stream would keep mixed images; leave them out"
        )
    if prepared.stream is not None:
        beside = [r for r in ("unlabeled", "target") if getattr(images, r) is not None]
        if beside or images.tests:
            what = "domains.test" if images.tests else beside[0].replace("target", "domains.target")
            raise BadInput(
                f"data.{what} stands beside data.stream: its images are of tasks to come, too; "
                "leave one of them out"
            )
    if job.arm.active is not None:
        if live.pretext:
            raise BadInput("a pretext learns without labels, and active buys some: leave one out")
        images.train.classes("active")
        if (most := job.arm.active.counts()[-1]) > len(images.train):
            raise BadInput(
                f"active buys {most} labels, but there are {len(images.train)} training images"
            )
    if images.train.known.any():
        return
    if not live.pretext or job.arm.stages or job.arm.stream or job.arm.subset:
        raise BadInput(
            "data.labels is 0, so there is no label to learn from: let a pretext (simclr, mae, …) "
            "train an arm of its own, which another builds on with `init: run:NAME`"
        )
    if images.held_out is None:
        raise BadInput(
            "data.labels is 0, so no training image says how good the features are: set "
            "data.held_out, whose images are the neighbours then"
        )
    if job.arm.train.target is not None:
        raise BadInput(
            "data.labels is 0, so the images held out are the neighbours, and none are left to "
            "look for train.target on: leave it out, or give labels"
        )


def neighbours(trained: data.ImageSet, held_out: data.ImageSet | None) -> data.ImageSet:
    """Return the images that nearest neighbours are looked for among: those trained on whose label
    is known, else those held out."""
    known = trained.known
    if known.all():
        return trained.plain()
    if known.any() or held_out is None:
        return trained.plain().take(known.nonzero().squeeze(1))
    return held_out


def count(prepared: Prepared, live: Wrapped, tracker: Tracker) -> None:
    """Record what labels the training took, and what they were spent on.

    A pretext takes none, and those bought in rounds are counted as they are bought. Those held out
    are spent on thresholds where a technique calibrates, else on choosing; those of the test where
    a target was looked for on it.
    """
    images, arm = prepared.images, prepared.job.arm
    kind = images.train.label_kind or images.train.split.kind
    elsewhere = bool(arm.on) or any(t.trains_on for t in live.techniques)
    without = live.pretext or elsewhere or not arm.train.epochs
    learned = 0 if without and not arm.stages else int(images.train.known.sum())
    if arm.active is None:
        tracker.labels(kind, learned)
        tracker.images("labelled", learned)
    wanted = {arm.on} | {stream for i in live.installed for stream in i.wants}
    for stream, role in (("unlabeled", "unlabelled"), ("target", "target")):
        beside = getattr(images, stream)
        if stream in wanted and beside is not None:
            tracker.images(role, len(beside))
    if images.held_out is not None:
        chosen = any(i.calibrates for i in live.installed)
        tracker.labels(kind, len(images.held_out), why="threshold" if chosen else "selection")
    elif any(each.train.target is not None for each in arm.stages or (arm,)):
        tracker.labels(kind, len(images.test), why="selection", name="test")


def on_tests(
    prepared: Prepared, live: Wrapped, tracker: Tracker, metrics: dict[str, float]
) -> None:
    """Record the metrics of each named test; those of the first are known."""
    tests = prepared.images.tests
    if not tests or live.pretext:
        return
    (first, _), *others = tests.items()
    results, size = {first: metrics}, prepared.job.arm.test_batch
    with tracker.phase("eval"):
        for name, images in others:
            with live.served() as model:
                results[name] = evaluate(model, data.batches(images, size), prepared.task)
    tracker.fact(tests=results)


def spoiled(images: data.Data) -> dict[str, int] | None:
    """Return how many training labels are wrong on purpose, {"wrong", "of"}; None where none is:
    there is no noise, or labels are candidates."""
    if images.truth is None or images.truth.shape != images.train.targets.shape:
        return None
    wrong = int((images.truth != images.train.targets).sum())
    return {"wrong": wrong, "of": len(images.truth)}
