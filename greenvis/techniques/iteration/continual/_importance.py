"""How much each weight mattered to a task: Fisher informations (EWC), gradients of the answers'
norm (MAS), paths (SI), and the penalty by them. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.technique import logits_of
from greenvis.tasks.answers import require_class_numbers
from greenvis.techniques._shared.attach import precise
from greenvis.techniques.iteration.continual._gradients import sample_gradients

Fisher = Literal["sample", "batch", "weighted", "true"]
_TOGETHER = 256  # samples to take at once where batches do not matter
INSTEAD = "weigh by what reads no labels: method mas, or si"


def fisher(
    model: nn.Module, names: list[str], loader: Any, definition: Fisher = "sample"
) -> dict[str, Tensor]:
    """Return the diagonal of a Fisher information by parameter, a mean over the loader's samples.

    Of several processes each may bring its own part of the data: the mean is over all of it.

    Args:
        model: images to logits (batch, classes).
        names: parameters.
        loader: batches (x, y).
        definition: "sample": the square of each sample's gradient (the empirical Fisher). "batch":
            the square of each batch's mean gradient, a mean over batches; smaller about by the
            batch size (avalanche's). "weighted": each sample's square times the probability of its
            label (mammoth's, but for its division by full batches). "true": labels from the model,
            the expectation over all classes taken exactly, at the cost of a backward for each
            (Kirkpatrick et al., 2017).

    Returns:
        By name a tensor of the parameter's shape.
    """
    total = _zeros(model, names)
    count = 0
    for x, y in _on_device(model, loader, least=1 if definition == "batch" else _TOGETHER):
        require_class_numbers(y, "a Fisher information", INSTEAD)
        if definition == "batch":
            gradients = _gradients(
                model, names, lambda x=x, y=y: F.cross_entropy(_logits(model, x), y)
            )
            _add(total, {n: g.square() for n, g in gradients.items()})
            count += 1
            continue
        with torch.no_grad():
            p = _logits(model, x).softmax(-1)
        for label in range(p.shape[1]) if definition == "true" else (None,):
            labels = y if label is None else torch.full_like(y, label)
            chance = p.gather(1, labels[:, None]).squeeze(1)
            _add(
                total,
                _squares(
                    model,
                    names,
                    x,
                    labels,
                    torch.ones_like(chance) if definition == "sample" else chance,
                ),
            )
        count += len(x)
    count = distributed.all_reduce_sum(total, count)
    return {n: t / max(count, 1) for n, t in total.items()}


def mas(
    model: nn.Module,
    names: list[str],
    loader: Any,
    definition: Literal["sample", "batch"] = "batch",
) -> dict[str, Tensor]:
    """Return memory-aware importances by parameter (Aljundi et al., 2018, eq. 3), a mean over
    samples; labels are not used.

    Args:
        model: images to logits (batch, classes).
        names: parameters.
        loader: batches (x, y).
        definition: the absolute gradient of the squared L2 norm of the logits, of each "sample" or
            of each "batch"'s mean (as libraries have it).

    Returns:
        By name a tensor of the parameter's shape.
    """
    total = _zeros(model, names)
    count = 0
    for x, _ in _on_device(model, loader):
        for part in x.split(1 if definition == "sample" else len(x)):
            gradients = _gradients(
                model, names, lambda x=part: _logits(model, x).square().sum(1).mean()
            )
            _add(total, {n: len(part) * g.abs() for n, g in gradients.items()})
        count += len(x)
    count = distributed.all_reduce_sum(total, count)
    return {n: t / max(count, 1) for n, t in total.items()}


def path_importance(path: Tensor, moved: Tensor, damping: float) -> Tensor:
    """Return what a task's path through the weights adds to their importance (SI: Zenke et al.,
    2017, eq. 5).

    Args:
        path: the sum over steps of −gradient · change, of a parameter's shape.
        moved: the change over all steps.
        damping: added to its square.

    Returns:
        Of the parameter's shape, never negative.
    """
    return (path / (moved.square() + damping)).clamp_min(0)


def penalty(
    parameters: Mapping[str, Tensor], importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """Return Σ importance · (parameter − anchor)², without a factor ½, as libraries have it.

    Args:
        parameters, importance, anchor: by name, of one shape each.

    Returns:
        A scalar.
    """
    return torch.stack(
        [(w * (parameters[n] - anchor[n]).square()).sum() for n, w in importance.items()]
    ).sum()


def _squares(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return by parameter the sum over samples of weight · gradient² of the cross entropy."""
    total = _zeros(model, names)
    for rows, gradients in sample_gradients(model, names, x, y):
        _add(
            total,
            {
                n: torch.einsum(
                    "b,b...->...", weights[rows].to(precise(g)), g.to(precise(g)).square()
                )
                for n, g in gradients.items()
            },
        )
    return total


def _gradients(model: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    parameters = [model.get_parameter(n) for n in names]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {n: (torch.zeros_like(p) if g is None else g).to(precise(p)) for n, p, g in pairs}


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = logits_of(model(x))
    return logits.to(precise(logits))


def _zeros(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    named = {n: model.get_parameter(n) for n in names}
    return {n: torch.zeros_like(p, dtype=precise(p)) for n, p in named.items()}


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        total[name] += value


def _on_device(model: nn.Module, loader: Any, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loader's batches on the model's device, some together until they hold `least`
    samples."""
    device = next(model.parameters()).device
    pending: list[tuple[Tensor, Tensor]] = []
    for x, y in loader:
        pending.append((x, y))
        if sum(len(x) for x, _ in pending) >= least:
            yield (
                torch.cat([x for x, _ in pending]).to(device),
                torch.cat([y for _, y in pending]).to(device),
            )
            pending = []
    if pending:
        yield (
            torch.cat([x for x, _ in pending]).to(device),
            torch.cat([y for _, y in pending]).to(device),
        )
