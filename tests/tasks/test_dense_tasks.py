"""Multi-label, regression, segmentation and bags against formulas, and labels nobody gave."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from torch import Tensor

from greenvis.errors import BadInput
from greenvis.tasks.bags import Bags
from greenvis.tasks.base import Task
from greenvis.tasks.classification import Classification
from greenvis.tasks.multilabel import Multilabel
from greenvis.tasks.regression import Regression
from greenvis.tasks.segmentation import Segmentation

RANDOM = torch.Generator().manual_seed(3)
NAN = float("nan")


def _metric(task: Task, name: str, outputs: Tensor, labels: Tensor, classes: int) -> float:
    metric = task.metrics(classes)[name]
    for rows in (slice(0, 2), slice(2, None)):
        metric.update(outputs[rows], labels[rows])
    return float(metric.compute())


def _masks() -> tuple[Tensor, Tensor]:
    labels = torch.randint(3, (5, 12, 9), generator=RANDOM)
    labels[0, :4] = 1
    labels[1, :, :5] = 2
    logits = torch.randn(5, 4, 12, 9, generator=RANDOM)
    return logits + 2 * F.one_hot(labels, 4).movedim(-1, 1), labels


PART_KNOWN: list[tuple[Task, Tensor, Tensor, Any]] = [
    (Classification(label_smoothing=0.1), torch.randn(4, 3, generator=RANDOM),
     torch.tensor([2, -1, 0, -1]), [0, 2]),
    (Bags(), torch.randn(4, 2, generator=RANDOM), torch.tensor([1, -1, 0, -1]), [0, 2]),
    (Multilabel(), torch.randn(3, 2, generator=RANDOM),
     torch.tensor([[1.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]), [0, 2]),
    (Regression(), torch.randn(3, 2, generator=RANDOM),
     torch.tensor([[1.0, 0.5], [NAN, NAN], [0.0, 2.0]]), [0, 2]),
    (Segmentation(), torch.randn(3, 4, 2, 3, generator=RANDOM),
     torch.stack([torch.zeros(2, 3), -torch.ones(2, 3), torch.ones(2, 3)]).long(), [0, 2]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "known"), PART_KNOWN, ids=lambda v: str(v)[:9]
)
def test_what_is_not_known_is_never_learned(
    task: Task, outputs: Tensor, labels: Tensor, known: list[int]
) -> None:
    learned = outputs.clone().requires_grad_()
    loss = task.loss(learned, labels)
    torch.testing.assert_close(loss, task.loss(outputs[known], labels[known]))
    loss.backward()
    assert learned.grad is not None
    unknown = [i for i in range(len(outputs)) if i not in known]
    assert not learned.grad[unknown].any()
    assert learned.grad[known].any()
    losses = task.losses(outputs, labels)
    assert not losses[unknown].any()
    torch.testing.assert_close(losses[known], task.losses(outputs[known], labels[known]))
    # nothing known at all: nothing to learn, and a step that stays finite
    nothing = outputs[unknown].clone().requires_grad_()
    task.loss(nothing, labels[unknown]).backward()
    assert task.loss(nothing, labels[unknown]).item() == 0
    assert nothing.grad is not None
    assert not nothing.grad.any()
    for name, metric in task.metrics(outputs.shape[1]).items():
        metric.update(outputs, labels)
        other = task.metrics(outputs.shape[1])[name]
        other.update(outputs[known], labels[known])
        assert float(metric.compute()) == pytest.approx(float(other.compute()), abs=1e-9)


def test_one_label_of_a_row_may_be_missing() -> None:
    logits, labels = torch.randn(2, 2, generator=RANDOM), torch.tensor([[1.0, -1.0], [0.0, 1.0]])
    known = [(0, 0), (1, 0), (1, 1)]
    each = [F.binary_cross_entropy_with_logits(logits[i], labels[i]) for i in known]
    torch.testing.assert_close(Multilabel().loss(logits, labels), torch.stack(each).mean())
    numbers = torch.tensor([[1.0, NAN], [0.0, 3.0]])
    errors = [(logits[i] - numbers[i]).square() for i in known]
    torch.testing.assert_close(Regression().loss(logits, numbers), torch.stack(errors).mean())
    huber = Regression(criterion="huber", delta=0.5).loss(logits, numbers)
    want = [F.huber_loss(logits[i], numbers[i], delta=0.5) for i in known]
    torch.testing.assert_close(huber, torch.stack(want).mean())


def test_mean_average_precision_is_that_of_scikit_learn_over_classes_that_occur() -> None:
    logits = torch.rand(9, 4, generator=RANDOM)  # all within 0 … 1: still logits
    labels = (torch.rand(9, 4, generator=RANDOM) < 0.4).float()
    labels[:, 2] = 0
    assert (labels.sum(0) > 0).tolist() == [True, True, False, True]
    want = average_precision_score(labels[:, [0, 1, 3]], logits[:, [0, 1, 3]], average="macro")
    assert _metric(Multilabel(), "map", logits, labels, 4) == pytest.approx(want, abs=1e-9)


def test_errors_have_the_unit_of_the_numbers() -> None:
    task = Regression(quantity="mm")
    assert task.primary == ("rmse", "mm", False)
    outputs, labels = torch.randn(5, 2, generator=RANDOM), torch.randn(5, 2, generator=RANDOM)
    difference = (outputs - labels).double()
    assert _metric(task, "rmse", outputs, labels, 0) == pytest.approx(
        float(difference.square().mean().sqrt()), rel=1e-6
    )
    assert _metric(task, "abs_error", outputs, labels, 0) == pytest.approx(
        float(difference.abs().mean()), rel=1e-6
    )
    with pytest.raises(BadInput, match=r"number for each of \(5, 2\), not float32 \(5,\)"):
        task.check(outputs, labels[:, 0])


def test_intersection_over_union_is_that_of_scikit_learn() -> None:
    logits, labels = _masks()
    got = _metric(Segmentation(), "miou", logits, labels, 4)
    answers = logits.argmax(1).flatten()
    classes = sorted({*answers.tolist(), *labels.flatten().tolist()})
    want = jaccard_score(labels.flatten(), answers, labels=classes, average="macro")
    assert got == pytest.approx(want, abs=1e-9)
    right = float((answers == labels.flatten()).double().mean())
    assert _metric(Segmentation(), "pixel_accuracy", logits, labels, 4) == pytest.approx(right)
    # over all pixels, not a mean over batches or images
    by_image = np.mean([
        jaccard_score(b.flatten(), a.argmax(0).flatten(), average="macro")
        for a, b in zip(logits, labels, strict=True)
    ])  # fmt: skip
    assert abs(by_image - want) > 1e-3


def test_boundaries_are_what_an_erosion_takes_away() -> None:
    logits, labels = _masks()
    band = 0.1
    size = max(1, round(band * math.hypot(12, 9)))
    assert size == 2
    square = np.ones((2 * size + 1, 2 * size + 1), bool)
    both, either = np.zeros(4), np.zeros(4)
    for answer, mask in zip(logits.argmax(1).numpy(), labels.numpy(), strict=True):
        for c in range(4):
            a, b = (m & ~binary_erosion(m, square) for m in (answer == c, mask == c))
            both[c] += (a & b).sum()
            either[c] += (a | b).sum()
    want = (both / np.maximum(either, 1))[either > 0].mean()
    task = Segmentation(band=band)
    assert _metric(task, "boundary_miou", logits, labels, 4) == pytest.approx(want, abs=1e-9)


def test_area_under_the_curve_is_that_of_scikit_learn() -> None:
    logits = torch.rand(11, 3, generator=RANDOM)
    labels = torch.tensor([0, 0, 1, 2, 1, 0, 2, 2, 0, 0, 1])
    want = roc_auc_score(labels, logits.double().softmax(1), multi_class="ovr", average="macro")
    # torchmetrics divides in single precision
    assert _metric(Bags(), "auc", logits, labels, 3) == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "says"),
    [
        (Segmentation(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8).long(), "head: dense"),
        (Segmentation(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "class number for each"),
        (Multilabel(), torch.zeros(2, 3), torch.zeros(2).long(), "one column per class"),
        (Multilabel(), torch.zeros(2, 3), torch.full((2, 3), 2.0), "from 0 to 1"),
        (Bags(), torch.zeros(2, 1), torch.zeros(2).long(), "one logit for each"),
        (Bags(), torch.zeros(2, 2), torch.zeros(3).long(), "each of 2 bags"),
    ],
)
def test_what_does_not_go_together_is_refused(
    task: Task, outputs: Tensor, labels: Tensor, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        task.check(outputs, labels)
