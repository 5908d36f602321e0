"""Training on a stream of tasks with the one loop: each task in turn, all of them tested after
each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from greenvis.core.technique import Samples
from greenvis.core.wrap import Wrapped
from greenvis.data.streams import Stream
from greenvis.experiment.evaluate import evaluate_among
from greenvis.experiment.loop import Loop, Part, Progress
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.track import Tracker
from greenvis.tasks.base import Task

MATRIX, KNOWN = "task_accuracy", "task_accuracy_known"


def fit_stream(
    live: Wrapped,
    stream: Stream,
    tests: Callable[[int], Iterable[Any]],
    spec: TrainSpec,
    run: Tracker,
    *,
    task: Task,
    seed: int = 0,
    checkpoint: Path | None = None,
    log_with: Sequence[str] = (),
    samples: Callable[[int, int, Tensor], Samples] | None = None,
    restart: bool = False,
) -> Progress:
    """Train `live` on each task of a stream in turn, `spec.epochs` each, and return how it ended.

    tests(i): the (x, y) of task i's test. samples(task, epoch, positions): which samples a batch
    holds. restart: begin each task from the weights `live` has now. Each task has an optimizer and
    a schedule of its own; phases are "train/task1/epoch1", "train/task1/end" (what techniques do at
    its end) and "eval/task1". Of Progress, `rows` holds "task_accuracy": a row a task, the accuracy
    on each task's test, among the classes of `Stream.head` (of its own task alone in a
    task-incremental stream); "task_accuracy_known": the same answers with the task given. A row
    that was not measured is None. Resumes in the middle of a task to the same weights.
    """
    start = {k: v.clone() for k, v in live.state_dict().items()} if restart else {}
    loop = Loop(live, spec, run, task, seed, checkpoint, log_with)
    progress, count = loop.progress, len(stream.tests)
    resumed = progress.step > 0
    for experience in stream.experiences[: progress.task]:
        if stream.has_task_boundaries:
            live.begin_experience(experience)
    with loop.logging():
        for index in range(progress.task, len(stream.experiences)):
            before, begun = run.observed(), time.monotonic()
            if restart:
                live.load_state_dict(start)
            if stream.has_task_boundaries:
                live.begin_experience(stream.experiences[index])
            loop.begin(_part(stream, index, spec, task, seed, samples))
            loop.train()
            if stream.has_task_boundaries:
                with run.phase(f"train/task{index + 1}/end"):
                    live.end_experience(Repeatable(stream, index, spec, seed))
            with run.phase(f"eval/task{index + 1}"):
                accuracies = _test(loop, stream, index, tests)
            for name, row in accuracies.items():
                rows = progress.rows.setdefault(
                    name, [[None] * count for _ in range(count - len(stream.experiences))]
                )
                rows.append(cast("list[float | None]", row))
            spent = {q: v - before.get(q, 0.0) for q, v in run.observed().items()}
            spent |= {"from_s": begun, "to_s": time.monotonic()}
            progress.observed.append(None if resumed else spent)
            resumed = False  # of the others nothing lies in an earlier record
            progress.accuracy = math.fsum(accuracies[MATRIX]) / count
            loop.log(task=index + 1, accuracy=progress.accuracy)
            progress.task, progress.epoch = index + 1, 0
    loop.model.eval()
    progress.epoch = spec.epochs
    return progress


class Repeatable:
    """The (x, y) of a finished task, as often as they are gone through, in the same order."""

    def __init__(self, stream: Stream, index: int, spec: TrainSpec, seed: int) -> None:
        self._loader = partial(
            stream.batches, index, spec.batch_size, seed=seed, workers=spec.workers
        )
        self._length = math.ceil(len(stream.train[index]) / spec.batch_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Any:
        return ((x, y) for x, y, _ in self._loader())


def _part(
    stream: Stream,
    index: int,
    spec: TrainSpec,
    task: Task,
    seed: int,
    samples: Callable[[int, int, Tensor], Samples] | None,
) -> Part:
    def batches(epoch: int, start: int) -> Iterable[Any]:
        return stream.batches(
            index, spec.batch_size, epoch=epoch, start=start, seed=seed, workers=spec.workers
        )

    return Part(
        batches,
        math.ceil(len(stream.train[index]) / spec.batch_size),
        None if samples is None else partial(samples, index),
        phase=f"train/task{index + 1}",
        task_loss=lambda outputs, y: task.loss(stream.masked(index, outputs, y), y),
    )


def _test(
    loop: Loop, stream: Stream, index: int, tests: Callable[[int], Iterable[Any]]
) -> dict[str, list[float]]:
    """Return the accuracy on each task's test, by name of the matrix."""
    live = loop.live
    seen = None if stream.head == "single" else stream.experiences[index].classes_so_far
    out: dict[str, list[float]] = {}
    for t, (classes, _) in enumerate(stream.tests):
        if stream.kind == "task":
            shown: dict[str, tuple[int, ...] | None] = {MATRIX: classes}
            live.eval_experience(
                stream.experiences[t] if len(stream.experiences) == len(stream.tests) else None
            )
        else:
            shown = {MATRIX: seen} | ({} if stream.kind == "domain" else {KNOWN: classes})
        metrics = evaluate_among(loop.model, tests(t), loop.task, shown, loop.accelerator)
        for name, values in metrics.items():
            out.setdefault(name, []).append(values[loop.task.primary.name])
    live.eval_experience(None)
    return out
