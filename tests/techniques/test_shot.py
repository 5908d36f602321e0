"""Source-free adaptation: the formulas, and that no image of the source is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Samples
from greenvis.data.image_set import ImageSet
from greenvis.experiment import loop
from greenvis.meters.record import find, read
from greenvis.techniques.data.adapt.shot import centroid_labels, information_loss

X = torch.randn(11, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def _net() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def _by_hand(features: Tensor, logits: Tensor) -> list[int]:
    """Equations 4 to 6 image by image; a class that no answer names has no centroid."""
    points = np.concatenate([features.double().numpy(), np.ones((len(features), 1))], 1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    shares = logits.double().softmax(1).numpy()
    named = sorted(set(logits.argmax(1).tolist()))
    labels: list[int] = []
    for _ in range(2):
        centroids = {k: (shares[:, k : k + 1] * points).sum(0) / shares[:, k].sum() for k in named
                     if shares[:, k].sum() > 0}  # fmt: skip
        labels = [
            min(centroids, key=lambda k: 1 - p @ centroids[k] / np.linalg.norm(centroids[k]))
            for p in points
        ]
        shares = np.eye(logits.shape[1])[labels]
    return labels


def test_labels_are_those_of_the_nearest_centroids() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator) + 2 * F.one_hot(torch.arange(60) % 5).float()
    logits = torch.randn(60, 5, generator=generator) + features
    logits[:, 3] = -9.0  # never the likeliest
    labels, centroids = centroid_labels(features, logits)
    assert labels.tolist() == _by_hand(features, logits)
    assert 3 not in labels
    assert centroids[3].abs().sum() == 0
    assert not torch.equal(labels, logits.argmax(1))


def test_information_is_sure_answers_of_all_classes() -> None:
    logits = torch.randn(6, 4)
    p = logits.softmax(1)
    unsure = sum(-sum(q * math.log(q) for q in row) for row in p.tolist()) / 6
    spread = -sum(q * math.log(q) for q in p.mean(0).tolist())
    assert information_loss(logits).item() == pytest.approx(unsure - spread, abs=1e-5)
    diverse = 20.0 * F.one_hot(torch.arange(4), 4).float()
    assert information_loss(diverse).item() == pytest.approx(-math.log(4), abs=1e-4)
    assert information_loss(diverse[:1].repeat(4, 1)).item() == pytest.approx(0.0, abs=1e-4)


def test_the_classifier_is_frozen_and_the_labels_hold_for_an_epoch() -> None:
    live = gv.wrap(_net(), gv.Shot(labels_weight=0.5))
    live.feed(target=[X[:6], X[6:]])
    model: Any = live.model
    assert [g["lr"] for g in live.param_groups(1.0)] == [0.1]
    assert not any(p.requires_grad for p in model[5].parameters())
    mine = _net().eval()
    with torch.no_grad():
        labels, _ = centroid_labels(mine[:5](X), mine(X))
    rows = torch.tensor([7, 2, 9])
    live.set_samples(Samples(Path(), {}, len(X), 1, rows))
    optimizer = torch.optim.SGD(live.param_groups(1.0))
    for _ in range(2):  # the second step's labels are those of before the first
        images, y = live.batch(X[rows], torch.full((3,), -1))
        outputs = model.train()(images)
        assert live.criterion(F.cross_entropy)(outputs, y).item() == 0.0
        term = live.terms(images, y, outputs)["shot"]
        expected = information_loss(outputs) + 0.5 * F.cross_entropy(outputs, labels[rows])
        assert term.item() == pytest.approx(expected.item(), abs=1e-5)
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        live.step_end()
    state = live.installed[0].state_dict()
    assert torch.equal(state["labels"], labels)
    live.epoch_end()
    assert live.installed[0].state_dict() == {}


def test_without_positions_labels_are_those_of_the_nearest_centroids() -> None:
    live = gv.wrap(_net(), gv.Shot(labels_weight=1.0))
    live.feed(target=[X[:6], X[6:]])
    model: Any = live.model
    images, y = live.batch(X[:4], torch.full((4,), -1))
    outputs = model.eval()(images)
    with torch.no_grad():
        labels, _ = centroid_labels(model[:5](X), model(X))
        model(images)
    expected = information_loss(outputs) + F.cross_entropy(outputs, labels[:4])
    assert live.terms(images, y, outputs)["shot"].item() == pytest.approx(expected.item(), abs=1e-5)


RECIPE = """
name: free
data: {name: digits, train: 90, test: 40, labels: 30, domains: {target: [noise], test: [noise]}}
model: {ref: timm/resnet18, in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}
train: {epochs: 1, batch_size: 20}
arms:
  source: {}
  shot:
    model: {init: "run:source", classifier: keep}
    techniques: [shot]
"""


def test_a_recipe_reads_no_image_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "free.yaml"
    file.write_text(RECIPE)
    shown: dict[str, set[tuple[int, bool]]] = {"source": set(), "shot": set()}
    batch, train = ImageSet.batch, loop.run

    def training(prepared: Any, *args: Any, **kwargs: Any) -> Any:
        def noting(self: ImageSet, positions: Any, epoch: int = 0) -> Any:
            shown[prepared.job.arm.name].add((len(self), bool(self.known.any())))
            return batch(self, positions, epoch)

        monkeypatch.setattr(ImageSet, "batch", noting)
        try:
            return train(prepared, *args, **kwargs)
        finally:
            monkeypatch.setattr(ImageSet, "batch", batch)

    monkeypatch.setattr(loop, "run", training)
    folder = gv.run(file, runs=tmp_path / "runs")
    test, target, labelled = (40, True), (60, False), (30, True)
    assert shown == {"source": {labelled, test}, "shot": {target, test}}
    runs = {read(p).header["arm"]: read(p) for p in find([folder])}
    assert {run.status for run in runs.values()} == {"done"}
    assert {(i["role"], i["count"]) for i in runs["shot"].images if i["count"]} == {("target", 60)}
