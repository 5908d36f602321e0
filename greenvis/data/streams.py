"""Streams of tasks from a data set: its classes in groups, its images rotated or permuted, or
groups that run into each other.

Continual learning's three settings (van de Ven and Tolias, 2019): class-incremental (new classes
come, the test says nothing), task-incremental (the test says which task an image is of),
domain-incremental (the same classes look different); and task-free (Aljundi et al., 2019): nobody
says where a task ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from greenvis.core.technique import Experience, mask_classes
from greenvis.data.changes import Change, Changed
from greenvis.data.image_set import Concat, ImageSet
from greenvis.data.loaders import batches
from greenvis.data.roles import Data
from greenvis.errors import BadInput

Kind = Literal["class", "domain", "task", "free"]
Head = Literal["single", "growing", "multi"]
HALF_TURN = 180.0  # degrees over which the domains of a rotated stream are spread


@dataclass(frozen=True)
class Stream:
    """Experiences in order, with what to train each on, and what to test on after each.

    Attributes:
        kind: "class", "task", "domain" or "free".
        head: "single": all classes compete from the start. "growing": those seen so far. "multi":
            those of an image's own task while training; at test time those seen so far, or those of
            its task where the test says which.
        experiences: In order; one where all is learned at once.
        train: The training images of each experience.
        tests: (classes, images) by task.
        classes: How many in all.
    """

    kind: Kind
    head: Head
    experiences: tuple[Experience, ...]
    train: tuple[ImageSet, ...]
    tests: tuple[tuple[tuple[int, ...], ImageSet], ...]
    classes: int

    @property
    def has_task_boundaries(self) -> bool:
        """Whether techniques hear where a task begins and ends."""
        return self.kind != "free"

    def facts(self) -> dict[str, Any]:
        """Return what a run record says about its stream."""
        groups = [list(classes) for classes, _ in self.tests]
        return {"kind": self.kind, "head": self.head, "tasks": len(self.tests), "classes": groups,
                "train": [len(images) for images in self.train]}  # fmt: skip

    def batches(
        self,
        index: int,
        batch_size: int,
        *,
        epoch: int = 0,
        start: int = 0,
        seed: int = 0,
        workers: int = 0,
    ) -> DataLoader[Any]:
        """Return one epoch's loader of an experience, shuffled; see `data.batches`.

        Args:
            index: Of the experience.
            batch_size: Samples per batch.
            epoch: From 0.
            start: Batches to pass over unread.
            seed: Of the shuffling.
            workers: Processes that load.

        Returns:
            A loader of (x, y, positions).
        """
        options: dict[str, Any] = {
            "epoch": epoch,
            "seed": seed + 7919 * index,
            "start": start,
            "workers": workers,
        }
        return batches(self.train[index], batch_size, shuffle=True, positions=True, **options)

    def masked(self, index: int, logits: Tensor, y: Tensor) -> Tensor:
        """Return the logits of a training step, -inf where a class does not compete.

        A replayed image of an earlier task competes with its own task's classes under a multi head.

        Args:
            index: Of the experience.
            logits: (batch, outputs).
            y: Labels int64 (batch,).

        Returns:
            (batch, outputs).

        Raises:
            BadInput: For mixed labels, unless the head is single.
        """
        if self.head == "single":
            return logits
        if y.ndim != 1 or y.is_floating_point():
            raise BadInput(
                f"a {self.head} head needs one label an image; what mixes labels needs `stream: "
                f"{{head: single}}`"
            )
        if self.head == "growing":
            return mask_classes(logits, self.experiences[index].classes_so_far)
        fellows = torch.zeros(self.classes, logits.shape[1], dtype=torch.bool, device=logits.device)
        for classes, _ in self.tests:
            at = torch.tensor(classes, device=logits.device)
            fellows[at[:, None], at] = True
        return logits.masked_fill(~fellows[y], -torch.inf)


def make(
    images: Data,
    *,
    kind: Kind = "class",
    tasks: int = 5,
    order: Literal["seed", "given"] = "seed",
    head: Head | None = None,
    domain: Literal["rotate", "permute"] = "rotate",
    blur: float = 0.5,
    train_on: Literal["task", "seen", "all"] = "task",
    seed: int = 0,
) -> Stream:
    """Cut a data set into a stream of experiences.

    Args:
        images: The data set.
        kind: "class", "task" and "free" deal the classes out to tasks; "domain" shows all images in
            each task, turned (task t of T by t/T of a half turn) or their pixels permuted (the
            first as they are).
        tasks: How many.
        order: "seed": classes in an order drawn from `seed`; "given": as the data has them.
        head: See `Stream`; "multi" for kind "task", else "single".
        domain: How images of "domain" change.
        blur: Of "free": an image stands up to so many tasks from its own position.
        train_on: Each task's own images, all images seen so far (cumulative), or all at once
            (joint).
        seed: Of the order.

    Returns:
        The stream.

    Raises:
        BadInput: For more tasks than classes, or a multi head where tasks share their classes.
    """
    count = len(images.classes)
    _check(images, kind, tasks, head)
    train: list[ImageSet]
    tests: list[ImageSet]
    if kind == "domain":
        groups = [tuple(range(count))] * tasks
        drawn_by = seed if order == "seed" else 0
        changes = [_domain_shift(domain, t, tasks, drawn_by) for t in range(tasks)]
        train = [Changed(images.train, change) for change in changes]
        tests = [Changed(images.test, change) for change in changes]
    else:
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        classes = shuffled if order == "seed" else torch.arange(count)
        groups = [tuple(part.tolist()) for part in classes.tensor_split(tasks)]
        rows = _rows_of(images.train, groups)
        if kind == "free":
            rows = _blurred(rows, blur, seed)
        train = [images.train.take(r) for r in rows]
        tests = [images.test.take(r) for r in _rows_of(images.test, groups)]
    if train_on == "all":
        train = [Concat(train)]
    elif train_on == "seen":
        train = [Concat(train[: t + 1]) for t in range(tasks)]
    drawn = train_on == "all" or kind in ("free", "domain")
    experiences = _experiences(train, groups, drawn, kind)
    head = head or ("multi" if kind == "task" else "single")
    named = tuple(zip(groups, tests, strict=True))
    return Stream(kind, head, experiences, tuple(train), named, count)


def _check(images: Data, kind: Kind, tasks: int, head: Head | None) -> None:
    for part in (images.train, images.test):
        part.classes("a stream")
    if kind != "domain" and tasks > (count := len(images.classes)):
        raise BadInput(
            f"stream: {tasks} tasks need as many classes, and the data has {count}; ask for fewer "
            "tasks"
        )
    if kind == "domain" and head == "multi":
        raise BadInput(
            "stream: the tasks of a domain stream share their classes, so a multi head has nothing "
            "to part"
        )


def _experiences(
    train: Sequence[ImageSet], groups: Sequence[tuple[int, ...]], drawn: bool, kind: Kind
) -> tuple[Experience, ...]:
    """Return what is said of each experience; drawn: its classes are those its images have, not its
    group."""
    ordered = tuple(dict.fromkeys(c for group in groups for c in group))
    out: list[Experience] = []
    for t, part in enumerate(train):
        labels = set(part.targets.tolist())
        own = tuple(c for c in ordered if c in labels) if drawn else groups[t]
        before = out[-1].classes_so_far if out else ()
        so_far = before + tuple(c for c in own if c not in before)
        out.append(Experience(t, own, so_far, len(train), kind == "task"))
    return tuple(out)


def _rows_of(images: ImageSet, groups: Sequence[Sequence[int]]) -> list[Tensor]:
    return [
        torch.isin(images.targets, torch.tensor(group)).nonzero().squeeze(1) for group in groups
    ]


def _blurred(rows: Sequence[Tensor], blur: float, seed: int) -> list[Tensor]:
    """Line the rows of all tasks up by their task's place plus a draw from ±blur tasks, and cut the
    line into equal parts."""
    position = torch.empty(sum(map(len, rows)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for t, own in enumerate(rows):
        position[own] = t + torch.rand(len(own), generator=generator, dtype=torch.float64)
    position += blur * (2 * torch.rand(len(position), generator=generator, dtype=torch.float64) - 1)
    return list(position.argsort().tensor_split(len(rows)))


def _domain_shift(domain: str, t: int, tasks: int, seed: int) -> Change:
    if domain == "rotate":
        return Change(degrees=HALF_TURN * t / tasks)
    return Change(seed=seed * 1009 + t if t else None)
