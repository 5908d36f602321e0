"""The role of each image: which to train on, with a label or without one, and which to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from greenvis.data import bags, captions, questions
from greenvis.data.changes import SORTED, in_order, parse
from greenvis.data.draws import BAGS, Draw, in_domain
from greenvis.data.image_set import Concat, ImageSet
from greenvis.data.roles import Data
from greenvis.data.spec import BagsSpec, DataSpec
from greenvis.data.transforms import LIBRARY
from greenvis.errors import BadInput, GreenvisError, nearest


def assign(pool: Data, spec: DataSpec, seed: int) -> Data:
    """Give the images of a data set their roles.

    Args:
        pool: The data set, all of its training images labelled.
        spec: What the recipe, or an arm of it, says.
        seed: Of the run.

    Returns:
        The data set; `pool` itself where nothing is asked for.

    Raises:
        BadInput: For more than there is.
    """
    settings = spec.roles()
    form = replace(pool.train.transform, augment=spec.augment, views=spec.views)
    if spec.augment in LIBRARY and pool.train.split.kind in ("mask", "box"):
        raise BadInput(
            f"data: augment: {spec.augment} has no rule for labels of kind "
            f"{pool.train.split.kind}; choose crop, crop-flip or random-resized-crop"
        )
    if not settings:
        same = form == pool.train.transform
        return pool if same else replace(pool, train=pool.train.shown(form))
    draw = Draw(spec.seed, seed)
    if spec.bags is not None:
        pool = _bagged(pool, spec.bags, draw, spec.seed)
    every = pool.train.shown(form)
    groups = every.split.groups
    rows = draw.long_tail(groups, spec.imbalance) if spec.imbalance else torch.arange(len(every))
    labelled, rest = draw.labelled(groups, rows, spec.labels)
    train = every.take(labelled)
    if spec.labels == 0:
        train, rest = every.take(rows).unlabeled(), rows[:0]
    without = _unlabeled(pool, every, rest, spec)
    target = _target(pool, every, rest[len(without or ()) :], spec)
    for role, images in (("unlabeled", without), ("domains.target", target)):
        if images is not None and not len(images):
            raise BadInput(
                f"data: no training image remains for {role}: set `labels`, so that some have none"
            )
    tests = pool.tests
    if (domains := spec.domains) is not None:
        train = draw.dealt(train, domains.train)
        without = without and draw.dealt(without, domains.unlabeled or domains.train)
        target = target and draw.dealt(target, domains.target)
        tests = tests or {name: changed(pool.test, name) for name in domains.test}
    truth = None
    if spec.noise is not None:
        truth, count = train.targets, len(pool.classes)
        if spec.noise.kind == "candidates":
            train = train.relabeled(draw.candidates(train, count, spec.noise.rate))
            train.label_kind = "candidate"
        else:
            train = train.relabeled(draw.noisy(train, count, spec.noise))
    out = replace(
        pool, train=train, test=next(iter(tests.values()), pool.test), unlabeled=without,
        target=target, tests=tests, truth=truth, settings=settings,
    )  # fmt: skip
    _keep_apart(out)
    if spec.questions is not None:
        return _asked(out, spec.questions, spec.seed)
    return out if spec.captions is None else _captioned(out, spec.captions)


def _bagged(pool: Data, spec: BagsSpec, draw: Draw, test_seed: int) -> Data:
    """Return the images of each role in bags; those of the test are the same for every run."""
    positive = class_numbers(pool.name, spec.positive, pool.classes)
    if len(positive) == len(pool.classes):
        raise BadInput("data: bags of positive images alone; name fewer classes in bags.positive")
    sets = {"train": draw.seed(BAGS), "test": test_seed, "held_out": test_seed}
    dealt = {
        role: bags.deal(images, positive, spec.size, seed)
        for role, seed in sets.items()
        if (images := getattr(pool, role)) is not None
    }
    if pool.target is not None or pool.unlabeled is not None:
        raise BadInput(
            "data: bags are dealt before they lose their labels, so images of a domain of the data "
            "set's own cannot be in bags without: name changes (noise, blur, …) in domains.target "
            "and domains.unlabeled"
        )
    tests = {n: bags.deal(own, positive, spec.size, test_seed) for n, own in pool.tests.items()}
    return replace(pool, **dealt, tests=tests, classes=bags.CLASSES)


def _texted(images: Data) -> dict[str, ImageSet]:
    """Return the sets whose images get texts, by role; those of further tests by "test NAME"."""
    named = {"train": images.train, "held_out": images.held_out, "test": images.test}
    return {role: part for role, part in named.items() if part is not None} | {
        f"test {name}": part for name, part in images.tests.items()
    }


def _asked(images: Data, count: int, seed: int) -> Data:
    """Return the images with questions, of the words of those trained on."""
    sets = _texted(images)
    pairs = {role: questions.ask(p, images.classes, count, seed) for role, p in sets.items()}
    known = questions.vocabulary(pairs["train"])
    out: dict[str, Any] = {
        role: questions.asked(part, pairs[role], known) for role, part in sets.items()
    }
    tests = {name: out.pop(f"test {name}") for name in images.tests}
    return replace(images, **out, tests=tests, words=known)


def _captioned(images: Data, template: str) -> Data:
    """Return the images with their texts, of the words of those trained on."""
    sets = _texted(images)
    texts = {role: captions.texts_of(p, images.classes, template) for role, p in sets.items()}
    if not any(texts["train"]):
        raise BadInput("data: captions need the name or the class of each image, and have neither")
    numbers = {text: i for i, text in enumerate(sorted({t for own in texts.values() for t in own}))}
    known = captions.vocabulary(texts["train"])
    out: dict[str, Any] = {
        role: captions.Captioned(part, texts[role], numbers, known) for role, part in sets.items()
    }
    tests = {name: out.pop(f"test {name}") for name in images.tests}
    return replace(images, **out, tests=tests, words=known)


def class_numbers(name: str, requested: Sequence[str | int], names: Sequence[str]) -> list[int]:
    """Return classes asked for as numbers.

    Args:
        name: Of the data set, for messages.
        requested: By name or number.
        names: Of all classes.

    Raises:
        BadInput: For a class that is none, or one named twice.
    """
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
    if len(set(numbers)) < len(numbers):
        raise BadInput(f"data: a class is named twice in {list(requested)}; name each once")
    return numbers


def _keep_apart(images: Data) -> None:
    """Raise GreenvisError where an image stands in two roles, or one without labels has some: no
    mistake of ours may let a training see what it is said not to."""
    owners: dict[int, str] = {}
    for role in ("train", "held_out", "unlabeled", "target"):
        part = getattr(images, role)
        if part is None:
            continue
        if role in ("unlabeled", "target") and part.known.any():
            raise GreenvisError(f"data: {int(part.known.sum())} labels of '{role}' would be shown")
        for number in part.ids.tolist():
            if owners.setdefault(number, role) != role:
                raise GreenvisError(f"data: an image of '{role}' is of '{owners[number]}', too")


def changed(images: ImageSet, name: str) -> ImageSet:
    """Return the test of a domain: images as it shows them, in the order its name asks for."""
    change = parse(name.removeprefix(SORTED))
    return in_order(images if change is None else in_domain(images, change), name)


def _target(pool: Data, every: ImageSet, rest: Tensor, spec: DataSpec) -> ImageSet | None:
    """Return the images of the domain to adapt to: those of the data set's own, else of the
    training images that no other role has."""
    if pool.target is not None:
        return pool.target.shown(every.transform).unlabeled()
    if spec.domains is None or not spec.domains.target:
        return None
    if spec.unlabeled == "rest":
        raise BadInput(
            "data: unlabeled: rest leaves no image for domains.target; give a number of them"
        )
    return every.take(rest).unlabeled()


def _unlabeled(pool: Data, every: ImageSet, rest: Tensor, spec: DataSpec) -> ImageSet | None:
    """Return the images to learn from without labels: those nobody labelled, then others."""
    if spec.unlabeled in (None, "none"):
        return None
    unknown = pool.unlabeled.shown(every.transform) if pool.unlabeled is not None else None
    if spec.unlabeled_folder is not None:
        return unknown and unknown.unlabeled()
    available = len(rest) + len(unknown or ())
    most = available if spec.unlabeled == "rest" else int(spec.unlabeled or 0)
    if most > available:
        raise BadInput(
            f"data: unlabeled asks for {most} images, but {available} training images have no "
            "label; ask for fewer, or for `rest`"
        )
    own = every.take(rest[: max(0, most - len(unknown or ()))]).unlabeled()
    if unknown is None:
        return own
    return Concat([unknown.take(torch.arange(min(most, len(unknown)))).unlabeled(), own])
