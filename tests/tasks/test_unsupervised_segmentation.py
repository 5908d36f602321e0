"""Clusters are matched with classes by the images they share, and judged as LUSS judges them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.tasks._matching import matched
from greenvis.tasks.unsupervised_segmentation import UnsupervisedSegmentation

TASK = UnsupervisedSegmentation()


def _measured(answers: Tensor, target: Tensor, classes: int) -> dict[str, float]:
    metrics = TASK.metrics(classes)
    outputs = F.one_hot(answers, classes).movedim(-1, 1).float()
    for rows in (slice(0, 2), slice(2, None)):
        for metric in metrics.values():
            metric.update(outputs[rows], target[rows])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def test_the_matching_is_the_best_of_all() -> None:
    shared = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(0)).double()
    order = matched(shared)
    best = max(sum(shared[i, p] for i, p in enumerate(own)) for own in permutations(range(5)))
    assert shared[torch.arange(5), order].sum() == best
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]


def test_every_figure_is_that_of_the_definition() -> None:
    """By loops over images and classes, on 7 images of unequal classes, one class in none."""
    generator = torch.Generator().manual_seed(1)
    classes, target = 5, torch.zeros(7, 9, 8, dtype=torch.int64)
    for i in range(7):
        target[i, 2:6, 1 : 3 + i % 4] = 1 + i % 3
        target[i, 7:, 5:] = 1 + (i * i) % 3
    names = torch.tensor([0, 3, 1, 4, 2])  # of classes among clusters
    answers = names[target]
    wrong = torch.rand(answers.shape, generator=generator) < 0.3
    wrong[2:] = False
    answers = torch.where(wrong, torch.randint(0, 5, answers.shape, generator=generator), answers)
    target[0, 0] = -1
    shared = torch.zeros(4, 4)
    known = target >= 0
    for i in range(7):
        for a in answers[i][known[i]].unique().tolist():
            for b in target[i][known[i]].unique().tolist():
                if a and b:
                    shared[a - 1, b - 1] += 1
    by_sum = sorted(
        permutations(range(4)), key=lambda p: float(sum(shared[i, j] for i, j in enumerate(p)))
    )
    own = by_sum[-1]
    assert sum(shared[i, j] for i, j in enumerate(by_sum[-2])) < sum(
        shared[i, j] for i, j in enumerate(own)
    )  # no other is as good
    order = torch.tensor([0, *(j + 1 for j in own)])
    named = order[answers]
    ious = []
    for c in range(classes):
        a, b = (named == c) & known, (target == c) & known
        ious.append(float((a & b).sum()) / max(1.0, float((a | b).sum())))
    right, scores = 0, []
    for i in range(7):
        areas = torch.bincount(named[i][known[i]], minlength=5)[1:]
        right += int(bool((target[i] == areas.argmax() + 1).any()))
        a, b = ((m[i] > 0) & known[i] for m in (named, target))
        p, r = ((a & b).sum() / m.sum() for m in (a, b))
        scores.append(float(1.3 * p * r / (0.3 * p + r)))
    found = _measured(answers, target, classes)
    assert found["miou"] == pytest.approx(sum(ious) / 5, abs=1e-6)
    assert found["image_accuracy"] == pytest.approx(right / 7, abs=1e-6)
    assert found["f_beta"] == pytest.approx(sum(scores) / 7, abs=1e-6)
    from greenvis.tasks._metrics import BoundaryIoU

    plain = BoundaryIoU(classes, TASK.band)
    plain.update(F.one_hot(named, classes).movedim(-1, 1).float(), target)
    occurring = int((plain.either > 0).sum())
    want = float(plain.compute()) * occurring / classes  # 0 of what occurs nowhere
    assert found["boundary_miou"] == pytest.approx(want, abs=1e-6)


def test_clusters_by_another_name_are_right() -> None:
    target = torch.zeros(4, 6, 6, dtype=torch.int64)
    for i in range(4):
        target[i, 1:4, 1:4] = 1 + i % 2
    turned = torch.tensor([0, 2, 1])[target]
    assert _measured(turned, target, 3) == {
        "miou": 1.0, "boundary_miou": 1.0, "image_accuracy": 1.0, "f_beta": pytest.approx(1.0),
    }  # fmt: skip
    nothing = _measured(torch.zeros_like(target), target, 3)
    assert nothing["miou"] == pytest.approx(float((target == 0).float().mean()) / 3)
    assert nothing["image_accuracy"] == nothing["f_beta"] == 0
