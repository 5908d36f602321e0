"""How good features are without training anything on them: k nearest neighbours of what the
classifier is handed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.errors import BadInput
from greenvis.models.structure import view

K, TEMPERATURE = 20, 0.07  # of Wu et al., 2018, as self-supervised models are compared since


def knn_accuracy(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    target: Tensor,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Return top-1 accuracy, 0 to 1, of the votes of each test image's k nearest training images
    (Wu et al., 2018).

    train, test: features (N, dim) and (M, dim); nearness is the cosine s, a vote weighs exp(s /
    temperature). labels, target: int64 (N,) and (M,).
    """
    from sklearn.neighbors import KNeighborsClassifier  # takes a second

    nearness: Any = lambda apart: np.exp((1 - apart) / temperature)  # noqa: E731
    votes = KNeighborsClassifier(
        min(k, len(train)), metric="cosine", algorithm="brute", weights=nearness
    )
    votes.fit(train.float().cpu().numpy(), labels.cpu().numpy())
    return float(votes.score(test.float().cpu().numpy(), target.cpu().numpy()))


def features(
    model: nn.Module, batches: Iterable[Any], head: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return what the classifier `head` (a path; found where absent) is handed, (N, dim), and the
    labels, int64 (N,).

    batches: of (x, y). The model's mode is put back. Raises BadInput where there is no classifier
    to look at.
    """
    path = head if head is not None else head_of(model)
    device = next(model.parameters()).device
    labels: list[Tensor] = []
    with head_inputs(model, path) as inputs, in_mode(model, False), torch.inference_mode():
        for x, y in batches:
            model(x.to(device))
            labels.append(y.to(device))
    return torch.cat(inputs), torch.cat(labels)


@contextmanager
def head_inputs(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Give a list that fills with what the classifier at `path` is handed, (batch, dim) each, as
    the model is called within."""
    inputs: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(1))
    )
    try:
        yield inputs
    finally:
        hook.remove()


def score(model: nn.Module, train: Iterable[Any], test: Iterable[Any], most: int = 2000) -> float:
    """Return `knn_accuracy` of a model's features on test batches, with about `most` training
    images to be neighbours."""
    head = head_of(model)
    first = next(iter(train))
    bank, labels = features(model, islice(train, max(1, -(-most // len(first[1])))), head)
    test_features, target = features(model, test, head)
    return knn_accuracy(bank, labels, test_features, target)


def head_of(model: nn.Module) -> str:
    """Return the path of the (first) classifier. Raises BadInput where the model shows none."""
    heads = view(model, probe=False).heads
    if not heads:
        raise BadInput(
            f"{type(model).__name__} shows no classifier, so nothing says what its features are"
        )
    return heads[0]
