"""Parts of one's own for the one training call: no recipe, any data, any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from greenvis import data
from greenvis.core.technique import Technique
from greenvis.data.streams import Stream
from greenvis.experiment.evaluate import Evaluator
from greenvis.experiment.parts import Part, Repeatable
from greenvis.experiment.recipe import TrainSpec
from greenvis.tasks.base import Task
from greenvis.tasks.classification import Classification


@dataclass
class Own:
    """What `loop.run` takes: a model, the techniques on it, and parts."""

    model: Callable[[], nn.Module]
    made: list[Part]
    seed: int = 0
    checkpoint: Path | None = None
    boundary: Path | None = field(default=None, init=False)

    def build(self) -> nn.Module:
        return self.model()

    def parts(self, tracker: Any) -> list[Part]:
        return self.made


def of_batches(
    batches: Callable[[int, int], Iterable[Any]],
    length: int,
    test: Callable[[], Iterable[Any]],
    spec: TrainSpec,
    techniques: Sequence[Technique] = (),
    *,
    task: Task | None = None,
    held_out: Callable[[], Iterable[Any]] | None = None,
    samples: Any = None,
) -> Part:
    """The training on batches."""
    task = task or Classification()
    return Part(
        spec=spec,
        task=task,
        batches=batches,
        length=length,
        evaluator=Evaluator(task, test, held_out),
        samples=samples,
        techniques=lambda: techniques,
    )


def of_stream(
    stream: Stream,
    spec: TrainSpec,
    techniques: Sequence[Technique] = (),
    *,
    task: Task | None = None,
    tests: Callable[[int], Iterable[Any]] | None = None,
) -> list[Part]:
    """The training on a stream, as recipes have it."""
    made = task or Classification()
    load = tests or (lambda t: data.batches(stream.tests[t][1], 64))
    evaluator = Evaluator(made, tuple, stream=stream, tests=load)
    out = []
    for index, images in enumerate(stream.train):
        loader = partial(stream.batches, index, spec.batch_size)
        length = math.ceil(len(images) / spec.batch_size)
        out.append(
            Part(
                spec=spec,
                task=made,
                batches=lambda epoch, start, loader=loader: loader(epoch=epoch, start=start),
                length=length,
                evaluator=evaluator,
                phase=f"train/task{index + 1}",
                techniques=(lambda: techniques) if index == 0 else None,
                loss=lambda outputs, y, i=index: made.loss(stream.masked(i, outputs, y), y),
                index=index,
                experience=stream.experiences[index] if stream.has_task_boundaries else None,
                finished=Repeatable(loader, length),
            )
        )
    return out


def resumed_and_not(
    fit: Callable[..., Any], epoch: Callable[[int, int], Sequence[Any]], file: Path
) -> tuple[Any, Any]:
    """Return what `fit(batches, checkpoint)` makes of two epochs of three batches that broke off in
    the second, and of those that did not."""

    def crash(number: int, start: int) -> Any:
        yield from epoch(number, 0)[: 3 - number]
        if number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(crash, file)
    assert file.exists()
    return fit(epoch, file), fit(epoch)
