"""The contract every task keeps, as a check that authors of plug-ins can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks.base import Task, TaskExample

RESERVED = {  # names that log lines and facts of a record have
    "epoch", "step", "loss", "task", "stage", "model", "data", "train", "techniques", "epochs",
    "stages", "stream", "threads", "params", "macs", "calibration", "predicted",
}  # fmt: skip
SIZE, FIRST = 12, 5  # samples; how many of them come in the first of two batches


def check_task(task: type[Task] | Task) -> None:
    """Try a task against the contract.

    Its loss is the mean of its losses per sample and has a gradient; it refuses what it cannot
    name as an answer, and labels that do not go with one; its metrics over two batches are those
    over all samples; the best answers score best, in the direction its primary metric names.

    Args:
        task: A class without required fields, or a task made.

    Raises:
        GreenvisError: With each rule it breaks on a line.

    Example:
        >>> from greenvis.tasks.classification import Classification
        >>> check_task(Classification(label_smoothing=0.1))
    """
    made = task() if isinstance(task, type) else task
    broken = list(_broken(made, made.example(SIZE)))
    if broken:
        raise GreenvisError(f"task '{made.name}': " + "\n".join(broken))


def _broken(task: Task, example: TaskExample) -> Iterator[str]:
    outputs, labels, best, learning = TaskExample(*example)
    yield from _loss_broken(task, outputs if learning is None else learning, labels)
    if learning is None and task.loss(best, labels) > task.loss(outputs, labels):
        yield "the best outputs have a higher loss than others"

    again = task.outputs(outputs)
    if not all(a is b for a, b in zip(tree_leaves(again), tree_leaves(outputs), strict=True)):
        yield "outputs() does not return outputs as they are"
    first = next(t for t in tree_leaves(outputs) if isinstance(t, Tensor))
    for raw in ({"one": first, "other": first}, (first, first), None):
        if not _refuses(task.outputs, raw):
            yield f"outputs() does not refuse {type(raw).__name__} that names no answer"
    task.check(outputs, labels)
    deeper = tree_map(lambda t: t.unsqueeze(-1).expand(*t.shape, 3), outputs)
    if not _refuses(task.check, deeper, labels):
        yield "check() does not refuse outputs with one axis more"

    measure = task.primary
    classes = outputs.shape[task.class_axis] if task.class_axis is not None else 0
    names = task.metrics(classes).keys()
    if measure.name not in names:
        yield f"the primary metric '{measure.name}' is not among {sorted(names)}"
        return
    declared = {measure.name, *(m.name for m in task.secondary or ())}
    if task.secondary is not None and declared != {*names}:
        yield f"it declares the metrics {sorted(declared)} and has {sorted(names)}"
    if RESERVED & names:
        yield f"a metric may not be called {sorted(RESERVED & names)[0]}: records use that name"
    at_once, in_parts = (
        _measured(task, classes, cuts, outputs, labels) for cuts in ((0, SIZE), (0, FIRST, SIZE))
    )
    for name in names:
        if abs(at_once[name] - in_parts[name]) > 1e-6:
            yield f"{name} of two batches is {in_parts[name]:g}, of all at once {at_once[name]:g}"
    score = _measured(task, classes, (0, SIZE), best, labels)[measure.name]
    gain = score - at_once[measure.name]
    if not (gain > 0 if measure.higher_is_better else gain < 0):
        direction = "higher" if measure.higher_is_better else "lower"
        yield (
            f"{measure.name} is {score:g} of the best outputs and {at_once[measure.name]:g} of "
            f"others, though {direction} is better"
        )


def _loss_broken(task: Task, outputs: Any, labels: Any) -> Iterator[str]:
    """Say what is wrong with a task's losses of what a model gives in training."""
    loss = task.loss(outputs, labels)
    if not task.model_loss:
        losses = task.losses(outputs, labels)
        if losses.shape != (SIZE,):
            yield f"losses are {tuple(losses.shape)}, not one per sample ({SIZE},)"
        elif not torch.allclose(losses.mean(), loss):
            yield f"the loss {loss:g} is not the mean of the losses per sample, {losses.mean():g}"
    leaves = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t
        for t in tree_leaves(outputs)
    ]
    task.loss(tree_unflatten(leaves, tree_flatten(outputs)[1]), labels).backward()
    grads = [t.grad for t in leaves if isinstance(t, Tensor) and t.grad is not None]
    if not any(bool(g.abs().sum() > 0) for g in grads):
        yield "the loss has no gradient"


def _measured(
    task: Task, classes: int, cuts: tuple[int, ...], outputs: Any, labels: Any
) -> dict[str, float]:
    metrics = task.metrics(classes)
    for begin, end in pairwise(cuts):
        for metric in metrics.values():
            metric.update(_rows(outputs, begin, end), _rows(labels, begin, end))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _rows(value: Any, begin: int, end: int) -> Any:
    """Return some samples of outputs or labels: of a list its entries, else of each tensor."""
    if isinstance(value, list):
        return value[begin:end]
    return tree_map(lambda t: t[begin:end], value)


def _refuses(call: Callable[..., Any], *args: Any) -> bool:
    try:
        call(*args)
    except BadInput:
        return True
    return False
