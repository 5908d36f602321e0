"""What a model reaches on labelled images, by the metrics of its task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.technique import mask_classes
from greenvis.errors import GreenvisError
from greenvis.tasks.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Among = Mapping[str, Sequence[int] | None]  # which classes compete, by name; None: all


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
                outputs = task.outputs(model(x))
            if not metrics:
                classes = 0 if task.class_axis is None else outputs.shape[task.class_axis]
                metrics = _new(task, among, classes, outputs.device)
            for name, competing in among.items():
                for metric in metrics[name].values():
                    metric.update(mask_classes(outputs, competing), y)
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
