"""What a model reaches on labelled images, by the metrics of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.technique import mask_classes
from greenvis.core.wrap import Wrapped
from greenvis.data.streams import Stream
from greenvis.errors import GreenvisError
from greenvis.experiment import knn
from greenvis.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

MATRIX, KNOWN = "task_accuracy", "task_accuracy_known"
Among = Mapping[str, Sequence[int] | None]  # which classes compete, by name; None: all


@dataclass(frozen=True)
class Evaluator:
    """How good a model is, by its task's metrics.

    Attributes:
        task: What the model answers.
        test: Batches (x, y) of the test.
        held_out: Batches to choose on, that no training sees; None where there are none.
        neighbours: Top-1 accuracy by nearest neighbours on batches (x, y), which stands for the
            metrics where no classifier is trained; None: it never does.
        untrained: Whether the classifier is a new one that nothing trains.
        stream: The stream whose experiences are tested one by one; None where there is none.
        tests: Batches (x, y) of an experience's test.
    """

    task: Task
    test: Callable[[], Iterable[Any]]
    held_out: Callable[[], Iterable[Any]] | None = None
    neighbours: Callable[[nn.Module, Iterable[Any]], float] | None = None
    untrained: bool = False
    stream: Stream | None = None
    tests: Callable[[int], Iterable[Any]] | None = None

    def without_classifier(self, live: Wrapped) -> str:
        """Say why neighbours are asked in place of the classifier; "" where they are not."""
        if self.neighbours is None or not (live.pretext or self.untrained):
            return ""
        why = "a pretext trains no classifier" if live.pretext else "no classifier was trained"
        return f"{why}; the accuracy is that of {knn.K} nearest neighbours"

    def on_test(self, live: Wrapped, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Return the metrics on the test, by name."""
        with _served(live, accelerator) as model:
            return self._on_test(live, model, accelerator)

    def _on_test(
        self, live: Wrapped, model: nn.Module, accelerator: Accelerator | None
    ) -> dict[str, float]:
        if self.neighbours is not None and self.without_classifier(live):
            return {"accuracy": self._by_neighbours(model, self.test())}
        return evaluate(model, self.test(), self.task, accelerator)

    def _by_neighbours(self, model: nn.Module, batches: Iterable[Any]) -> float:
        assert self.neighbours is not None
        return distributed.on_main(partial(self.neighbours, model, batches))

    def on_held_out(self, live: Wrapped, accelerator: Accelerator | None = None) -> float | None:
        """Return the primary metric on the images held out, of a pretext the accuracy of nearest
        neighbours; None where there are none."""
        if self.held_out is None:
            return None
        with _served(live, accelerator) as model:
            if self.without_classifier(live):
                return self._by_neighbours(model, self.held_out())
            metrics = evaluate(model, self.held_out(), self.task, accelerator)
        return metrics[self.task.primary.name]

    def loss_on_held_out(self, live: Wrapped, accelerator: Accelerator) -> float:
        """Return the task's mean loss on the images held out, of the weights in training."""
        assert self.held_out is not None
        model, total, count = live.model, 0.0, 0
        with in_mode(model, False), torch.no_grad():
            for x, y in shared(accelerator, self.held_out()):
                with accelerator.autocast():
                    loss = self.task.loss(self.task.answer(model, x, y), y)
                total, count = total + float(loss) * len(y), count + len(y)
        return total / count

    @property
    def learned_at_once(self) -> int:
        """How many of the stream's tasks have no experience of their own."""
        assert self.stream is not None
        return len(self.stream.tests) - len(self.stream.experiences)

    def on_experiences(
        self, live: Wrapped, index: int, accelerator: Accelerator
    ) -> dict[str, list[float]]:
        """Return the primary metric on each experience's test once `index` is learned.

        Returns:
            "task_accuracy": among the classes of `Stream.head` (of its own task alone in a
            task-incremental stream); "task_accuracy_known": the same answers with the task given.
        """
        assert self.stream is not None
        assert self.tests is not None
        stream, primary = self.stream, self.task.primary.name
        so_far = None if stream.head == "single" else stream.experiences[index].classes_so_far
        out: dict[str, list[float]] = {}
        for t, (classes, _) in enumerate(stream.tests):
            among: dict[str, Sequence[int] | None] = {MATRIX: so_far}
            if stream.kind == "task":
                among = {MATRIX: classes}
                separate = len(stream.experiences) == len(stream.tests)
                live.eval_experience(stream.experiences[t] if separate else None)
            elif stream.kind != "domain":
                among[KNOWN] = classes
            with live.served() as model:
                metrics = evaluate_among(model, self.tests(t), self.task, among, accelerator)
            for name, values in metrics.items():
                out.setdefault(name, []).append(values[primary])
        live.eval_experience(None)
        return out


@contextmanager
def _served(live: Wrapped, accelerator: Accelerator | None) -> Iterator[nn.Module]:
    """Hold the model as it is to answer, alike in all processes."""
    if accelerator is not None:
        distributed.sync(live.model.buffers())  # statistics of batch norms are each process's own
    with live.served() as model:
        yield model


def evaluate(
    model: nn.Module, batches: Iterable[Any], task: Task, accelerator: Accelerator | None = None
) -> dict[str, float]:
    """Return a task's metrics by name. The model's modes are put back.

    Args:
        model: On the accelerator's device, where there is one.
        batches: Of (x, y).
        task: Picks the answer, and has the metrics.
        accelerator: Moves batches, and shares them among processes; each sees all without.
    """
    return evaluate_among(model, batches, task, {"": None}, accelerator)[""]


def evaluate_among(
    model: nn.Module,
    batches: Iterable[Any],
    task: Task,
    among: Among,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, float]]:
    """Return a task's metrics where some classes alone compete, by the names of `among`, from one
    pass; see `evaluate`."""
    metrics: dict[str, dict[str, Metric]] = {}
    classes = 0
    loader = batches if accelerator is None else shared(accelerator, batches)
    with in_mode(model, False), torch.inference_mode():
        for x, y in loader:
            if not len(y):  # a batch of fewer samples than there are processes
                continue
            with nullcontext() if accelerator is None else accelerator.autocast():
                outputs = task.answer(model, x, y)
            if not metrics:
                classes = 0 if task.class_axis is None else outputs.shape[task.class_axis]
                metrics = _new(task, among, classes, x.device)
            for name, competing in among.items():
                for metric in metrics[name].values():
                    metric.update(
                        outputs if competing is None else mask_classes(outputs, competing), y
                    )
        together = False
        if accelerator is not None and (
            together := distributed.world_size() > 1
        ):  # some may have had no samples
            size = {"classes": torch.tensor([classes], device=accelerator.device)}
            holders = distributed.all_reduce_sum(size, int(bool(metrics)))
            classes = int(size["classes"]) // max(holders, 1)
            metrics = metrics or _new(task, among, classes, accelerator.device)
        metrics = metrics or _new(task, among, classes, torch.device("cpu"))
        return {name: _values(own, together) for name, own in metrics.items()}


def _new(
    task: Task, among: Among, classes: int, device: torch.device
) -> dict[str, dict[str, Metric]]:
    return {
        name: {key: metric.to(device) for key, metric in task.metrics(classes).items()}
        for name in among
    }


def _values(metrics: Mapping[str, Metric], together: bool) -> dict[str, float]:
    for metric in metrics.values():
        metric.sync_on_compute = together  # else a process evaluates alone, on all samples
    return {key: float(metric.compute()) for key, metric in metrics.items()}


def shared(accelerator: Accelerator, batches: Any) -> Any:
    """Return batches as they come to the device; to each of several processes its share."""
    if distributed.world_size() == 1:
        return accelerator.prepare(batches)
    if not isinstance(batches, DataLoader):
        raise GreenvisError(
            "several processes share the batches of a DataLoader, not of a "
            f"{type(batches).__name__}"
        )
    return prepare_data_loader(
        distributed.split_batches(batches),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
    )
