"""Detection, image and text, and generation against their definitions."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.tasks._frechet import features_of, halves
from greenvis.tasks.detection import Detection
from greenvis.tasks.generation import Drawn, Generation
from greenvis.tasks.image_text import ImageText, Pairs

# by pycocotools 2.0.11 on `_boxes()`; the test below asks it again where it is installed
COCO_MAP, COCO_MAP_50 = 0.3975646052000158, 0.6319455054749172


def _boxes() -> tuple[list[Any], list[Any]]:
    """Images with one to four boxes of three classes, and answers near them, far off, twice."""
    random = np.random.default_rng(7)
    answers, truths = [], []
    for image in range(12):
        n = 0 if image == 3 else int(random.integers(1, 5))
        corner, size = random.uniform(0, 60, (n, 2)), random.uniform(8, 30, (n, 2))
        boxes = np.concatenate([corner, corner + size], 1)
        labels = random.integers(1, 4, n)
        near = boxes + random.normal(0, 2, boxes.shape)
        far = np.concatenate([boxes[:1], random.uniform(0, 40, (2, 4))])
        far[-2:, 2:] += far[-2:, :2] + 1
        guessed = np.concatenate([near, far])
        kinds = np.concatenate([labels, labels[:1], random.integers(1, 5, 2)])
        scores = random.uniform(0.05, 1, len(guessed)).round(3)
        tensor = torch.from_numpy
        truths.append({"boxes": tensor(boxes), "labels": tensor(labels)})
        answers.append({
            "boxes": tensor(guessed), "labels": tensor(kinds), "scores": tensor(scores)
        })  # fmt: skip
    return answers, truths


def _ours(answers: list[Any], truths: list[Any]) -> tuple[float, float]:
    metrics = Detection().metrics(0)
    for rows in (slice(0, 5), slice(5, 12)):
        for metric in metrics.values():
            metric.update(answers[rows], truths[rows])
    return float(metrics["map"].compute()), float(metrics["map_50"].compute())


def _coco(answers: list[Any], truths: list[Any]) -> tuple[float, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def box(corners: Tensor) -> list[float]:
        x, y, right, low = corners.tolist()
        return [x, y, right - x, low - y]

    notes = [
        {"image_id": i, "bbox": box(b), "category_id": int(c), "iscrowd": 0,
         "area": box(b)[2] * box(b)[3]}
        for i, t in enumerate(truths) for b, c in zip(t["boxes"], t["labels"], strict=True)
    ]  # fmt: skip
    results = [
        {"image_id": i, "bbox": box(b), "category_id": int(c), "score": float(s)}
        for i, a in enumerate(answers)
        for b, c, s in zip(a["boxes"], a["labels"], a["scores"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        ours = COCO()
        ours.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": i} for i in range(1, 5)],
            "annotations": [n | {"id": i + 1} for i, n in enumerate(notes)],
        }
        ours.createIndex()
        judge = COCOeval(ours, ours.loadRes(json.loads(json.dumps(results))), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


def test_mean_average_precision_of_boxes_is_that_of_coco() -> None:
    answers, truths = _boxes()
    assert _ours(answers, truths) == pytest.approx((COCO_MAP, COCO_MAP_50), abs=1e-9)


def test_pycocotools_says_the_same() -> None:
    pytest.importorskip("pycocotools")
    answers, truths = _boxes()
    assert _coco(answers, truths) == pytest.approx((COCO_MAP, COCO_MAP_50), abs=1e-9)


def test_what_is_no_detector_is_refused_with_the_way_out() -> None:
    class Classifier(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    for model in (Classifier().train(), Classifier().eval()):
        with pytest.raises(BadInput, match="Classifier takes none: give it `head: boxes`"):
            Detection().answer(model, torch.rand(2, 3, 4, 4), None)


def test_a_detector_is_told_the_labels_in_training_alone() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    x = torch.rand(2, 3, 64, 64)
    y = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([2])}] * 2
    task = Detection()
    losses = task.answer(model.train(), x, y)
    loss = task.loss(losses, y)
    loss.backward()
    assert loss.item() == pytest.approx(sum(v.item() for v in losses.values()))
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        boxes = task.answer(model.eval(), x, y)
    assert len(boxes) == 2
    task.check(boxes, y)
    with pytest.raises(BadInput, match="train mode"):
        task.loss(boxes, y)
    with pytest.raises(BadInput, match="from 1 on"):
        task.check(losses, [{"boxes": torch.zeros(1, 4), "labels": torch.tensor([0])}] * 2)


def _pairs(generator: torch.Generator, labels: Tensor) -> Pairs:
    images, texts = (
        F.normalize(torch.randn(len(labels), 4, generator=generator), dim=1) for _ in range(2)
    )
    return Pairs(5 * images @ texts.T, images, texts)


def test_the_contrastive_loss_is_clips_where_each_text_comes_once() -> None:
    labels = torch.tensor([4, 0, 2, 7, 1])
    pairs = _pairs(torch.Generator().manual_seed(0), labels)
    order = torch.arange(5)
    want = (F.cross_entropy(pairs.logits, order) + F.cross_entropy(pairs.logits.T, order)) / 2
    torch.testing.assert_close(ImageText().loss(pairs, labels), want)
    # an equal text elsewhere in the batch is no wrong one
    both = torch.tensor([4, 0, 2, 4, 1])
    p, q = pairs.logits[3].softmax(0), pairs.logits.T[3].softmax(0)
    third = -0.25 * (p[[0, 3]].log().sum() + q[[0, 3]].log().sum())
    torch.testing.assert_close(ImageText().losses(pairs, both)[3], third)


def test_a_pair_that_nobody_knows_is_neither_right_nor_wrong() -> None:
    labels = torch.tensor([4, -1, 2, -1, 1])
    pairs = _pairs(torch.Generator().manual_seed(0), labels)
    known = labels >= 0
    part = Pairs(pairs.logits[known][:, known], pairs.images[known], pairs.texts[known])
    torch.testing.assert_close(
        ImageText().loss(pairs, labels), ImageText().loss(part, labels[known])
    )
    assert not ImageText().losses(pairs, labels)[~known].any()


def test_recall_is_over_the_whole_test_and_a_text_comes_once() -> None:
    labels = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6, 6, 6])
    pairs = _pairs(torch.Generator().manual_seed(5), labels)
    metrics = ImageText().metrics(0)
    for rows in (slice(0, 4), slice(4, 10)):
        for metric in metrics.values():
            metric.update(Pairs(pairs.logits, pairs.images[rows], pairs.texts[rows]), labels[rows])
    near = (pairs.images @ pairs.texts.T).numpy()
    ranks, zero = [], []
    for i, label in enumerate(labels.tolist()):
        by_number = {n: near[i][labels.numpy() == n].max() for n in range(7)}
        ranks.append(sorted(by_number, key=lambda n: -by_number[n]).index(label))
        means = torch.stack([F.normalize(pairs.texts[labels == n].sum(0), dim=0) for n in range(7)])
        zero.append(int((pairs.images[i] @ means.T).argmax()) == label)
    assert 0 < np.mean(np.array(ranks) < 5) < 1
    assert float(metrics["recall_1"].compute()) == pytest.approx(np.mean(np.array(ranks) < 1))
    assert float(metrics["recall_5"].compute()) == pytest.approx(np.mean(np.array(ranks) < 5))
    assert float(metrics["zero_shot"].compute()) == pytest.approx(np.mean(zero))


def test_texts_that_are_all_alike_find_by_chance_only() -> None:
    labels = torch.arange(8)
    alike = torch.ones(8, 3)
    metric = ImageText().metrics(0)["recall_1"]
    metric.update(Pairs(torch.ones(8, 8), alike, alike), labels)
    assert float(metric.compute()) == pytest.approx(1 / 8)


def test_what_names_no_pairs_is_refused() -> None:
    with pytest.raises(BadInput, match="dual encoder"):
        ImageText().outputs(SimpleNamespace(image_embeds=torch.zeros(2, 3)))


def _digits(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % 3
    return torch.rand(n, 1, 5, 4, generator=generator) + labels.view(-1, 1, 1, 1), labels


def test_the_frechet_distance_is_the_formula_and_adds_up() -> None:
    real, labels = _digits(90)
    drawn = real.flip(0) * 1.1
    metrics = Generation().metrics(0)
    for rows in (slice(0, 7), slice(7, 50), slice(50, 90)):
        for metric in metrics.values():
            metric.update(Drawn(drawn[rows], real[rows]), labels[rows])
    first = halves(real).numpy()
    assert 20 < first.sum() < 70

    def want(one: Tensor, other: Tensor) -> float:
        a, b = (features_of(t, "pixels").numpy() for t in (one, other))
        cov = [np.cov(f, rowvar=False) for f in (a, b)]
        cross = np.real(sqrtm(cov[0] @ cov[1])).trace()
        shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
        return shift + cov[0].trace() + cov[1].trace() - 2 * cross

    assert float(metrics["frechet"].compute()) == pytest.approx(
        want(drawn[first], real[~first]), abs=1e-6
    )
    floor = float(metrics["frechet_floor"].compute())
    assert floor == pytest.approx(want(real[first], real[~first]), abs=1e-6)
    assert 0 < floor < float(metrics["frechet"].compute())
    assert float(metrics["class_entropy"].compute()) == pytest.approx(np.log2(3), abs=0.05)


def test_drawing_one_class_alone_has_no_entropy() -> None:
    real, labels = _digits(30)
    metric = Generation().metrics(0)["class_entropy"]
    metric.update(Drawn(real[labels == 1].repeat(3, 1, 1, 1), real), labels)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-9)
    assert features_of(real, "random").shape == (30, 64)


def test_a_model_that_cannot_draw_is_refused() -> None:
    task = Generation()
    with pytest.raises(BadInput, match="no `sample`"):
        task.answer(nn.Flatten().eval(), torch.zeros(2, 1, 4, 4), torch.zeros(2))
    with pytest.raises(BadInput, match="returns its loss in training"):
        task.outputs(torch.zeros(2))


@pytest.mark.parametrize("task", [Detection(), Generation(), ImageText()], ids=lambda t: t.name)
def test_a_process_without_a_sample_adds_none(task: Any) -> None:
    outputs, labels, *_ = task.example(8)
    for name in task.metrics(3):
        alone, full, none, both = (task.metrics(3)[name] for _ in range(4))
        for metric in (alone, full):
            metric.update(outputs, labels)
        sent: list[list[Tensor]] = [[], []]  # what either process gathers, in order

        def gather(t: Tensor, group: Any, *, own: list[Tensor]) -> list[Tensor]:
            own.append(t)
            return [t, t]

        for metric, own in ((full, sent[0]), (none, sent[1])):
            metric.distributed_available_fn = lambda: True
            metric.sync(dist_sync_fn=partial(gather, own=own))
        kinds = [[(t.dtype, t.dim()) for t in own] for own in sent]
        assert kinds[0] == kinds[1]  # else gathering fails, or never ends
        pairs = iter([*zip(*sent, strict=True)])
        both.distributed_available_fn = lambda: True
        both.dist_sync_fn = lambda t, group, pairs=pairs: [*next(pairs)]
        torch.testing.assert_close(both.compute(), alone.compute())
