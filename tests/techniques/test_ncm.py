"""Nearest class mean: the classifier it computes, what it leaves alone, and the hosts it
refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

import greenvis as gv
from greenvis.techniques.iteration.continual.ncm import mean_classifier


def _net() -> nn.Module:
    torch.manual_seed(1)
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)
    )
    return nn.Sequential(body, nn.Linear(16, 5))


def _batches(classes: range, n: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(classes.start)
    out = []
    for _ in range(n):
        y = torch.randint(classes.start, classes.stop, (10,), generator=draw)
        out.append((torch.rand(10, 3, 2, 2, generator=draw) + 0.2 * y[:, None, None, None], y))
    return out


def _train(live: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(live.param_groups(0.1))
    live.model.train()
    for given in batches:
        x, y = live.batch(*given)
        logits = live.model(x)
        loss = live.criterion(F.cross_entropy)(logits, y) + live.loss(x, y, logits)
        assert loss.item() == 0
        loss.backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()


def test_the_linear_classifier_names_the_nearest_mean() -> None:
    means, x = torch.randn(6, 9), torch.randn(50, 9)
    weight, bias = mean_classifier(means)
    assert torch.equal((x @ weight.T + bias).argmax(1), torch.cdist(x, means).argmin(1))
    weight, bias = mean_classifier(means, "cosine")
    assert torch.equal(
        (x @ weight.T + bias).argmax(1),
        F.cosine_similarity(x[:, None], means[None], dim=2).argmax(1),
    )


def test_equals_scikit_learns_nearest_centroid_whatever_came_first() -> None:
    live = gv.wrap(_net(), gv.Ncm())
    seen = _batches(range(2)) + _batches(range(2, 4))
    for part in (seen[:4], seen[4:]):  # two tasks
        _train(live, part)
    body: Any = live.model[0]  # type: ignore[index]
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    test = torch.cat([x for x, _ in _batches(range(4), 8)])
    live.model.eval()
    with torch.no_grad():
        features, expected = body(x).numpy(), body(test).numpy()
        got = live.model(test).argmax(1).numpy()
    assert np.array_equal(got, NearestCentroid().fit(features, y.numpy()).predict(expected))
    assert live.facts()["ncm_classes"] == 4  # never class 4, of which nothing is known


def test_only_the_classifier_changes_and_undo_gives_it_back() -> None:
    model = _net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live = gv.wrap(model, gv.Ncm(metric="cosine"))
    assert torch.equal(
        live.model.state_dict()["1.weight"], before["1.weight"]
    )  # neutral until something was seen
    _train(live, _batches(range(3)))
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"1.weight", "1.bias"}  # not even the batch norm's statistics
    live.undo()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_goes_on_from_what_was_saved_and_merges_to_a_plain_model(tmp_path: Path) -> None:
    uninterrupted, first, second = (gv.wrap(_net(), gv.Ncm()) for _ in range(3))
    _train(uninterrupted, _batches(range(2)) + _batches(range(2, 4)))
    _train(first, _batches(range(2)))
    first.save(tmp_path)
    second.load(tmp_path)
    _train(second, _batches(range(2, 4)))
    x = torch.rand(7, 3, 2, 2)
    expected = uninterrupted.model.eval()(x)
    assert torch.equal(second.model.eval()(x), expected)
    merged = uninterrupted.merge()
    assert torch.equal(merged.eval()(x), expected)
    assert list(merged.state_dict()) == list(_net().state_dict())


def test_classifiers_it_cannot_write_into_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))
    with pytest.raises(gv.BadInput, match="choose metric cosine"):
        gv.wrap(net, gv.Ncm(input_shape=(3, 2, 2)))
    convolutional = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(gv.BadInput, match="is a Conv2d"):
        gv.wrap(convolutional, gv.Ncm(input_shape=(3, 4, 4)))
