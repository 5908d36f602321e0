"""Which answers teach: each method against its paper's formulas in other code, and what the green
variant computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.techniques.annotation.consistency import _weights as w
from greenvis.techniques.annotation.consistency._kept_answers import KeptAnswers
from greenvis.techniques.annotation.consistency.consistency import Consistency
from greenvis.techniques.annotation.consistency.pseudo_label import PseudoLabel

CLASSES, IMAGES = 5, 7


def _logits(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    weak, strong = (3 * torch.randn(IMAGES, CLASSES, generator=generator) for _ in range(2))
    return weak, strong


class _Answers(nn.Module):
    """A model whose answers are what a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(CLASSES))


def _terms(technique: gv.Technique, steps: int, per_image: int = 2) -> list[float]:
    """Return the term of each step; labelled images come first and are not its matter."""
    live = gv.wrap(_Answers(), technique)
    live.plan(10)
    out = []
    for step in range(steps):
        live.feed(unlabeled=[torch.zeros(IMAGES, 1, 2, 2)])
        x, y = live.batch(torch.zeros(IMAGES, 1, 2, 2), torch.zeros(IMAGES, dtype=torch.int64))
        assert len(x) == (1 + per_image) * IMAGES
        logits = torch.cat([torch.randn(IMAGES, CLASSES), *_logits(step)[:per_image]])
        (term,) = live.terms(x, y, logits).values()
        out.append(term.item())
        live.step_end()
    return out


def _softmax(logits: Tensor) -> np.ndarray:
    e = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_fixmatch_is_a_mean_over_all_images_also_those_not_sure() -> None:
    for step, value in enumerate(_terms(Consistency(mu=1, threshold=0.8), 4)):
        weak, strong = map(_softmax, _logits(step))
        losses = [
            -math.log(s[p.argmax()]) for p, s in zip(weak, strong, strict=True) if p.max() >= 0.8
        ]
        assert 0 < len(losses) < IMAGES
        assert value == pytest.approx(sum(losses) / IMAGES, abs=1e-5)


def test_pseudo_labels_teach_the_image_itself_by_a_growing_weight() -> None:
    values = _terms(PseudoLabel(mu=1, threshold=0.8, weight=2.0), 6, per_image=1)
    for step, value in enumerate(values):
        sure = [p.max() for p in _softmax(_logits(step)[0]) if p.max() >= 0.8]
        expected = 2.0 * min(1.0, step / 4) * sum(-math.log(p) for p in sure) / IMAGES
        assert value == pytest.approx(expected, abs=1e-5)


def test_freematch_has_thresholds_by_class_that_follow_the_training() -> None:
    m, factor = 0.7, 0.3
    values = _terms(Consistency(mu=1, method="freematch", momentum=m, fairness=factor), 6)
    tau, mean, histogram = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES), np.full(CLASSES, 1 / CLASSES)
    left_out = 0
    for step, value in enumerate(values):
        weak, strong = map(_softmax, _logits(step))
        top = weak.argmax(1)
        tau = m * tau + (1 - m) * weak.max(1).mean()
        mean = m * mean + (1 - m) * weak.mean(0)
        histogram = m * histogram + (1 - m) * np.bincount(top, minlength=CLASSES) / IMAGES
        mask = weak.max(1) >= (mean / mean.max() * tau)[top]
        left_out += int((~mask).sum())
        losses = -np.log(strong[np.arange(IMAGES), top]) * mask
        chosen = strong[mask]
        counts = np.bincount(chosen.argmax(1), minlength=CLASSES) / len(chosen)
        ours = np.divide(chosen.mean(0), counts, out=np.zeros(CLASSES), where=counts > 0)
        before = mean / histogram
        fairness = (before / before.sum() * np.log(ours / ours.sum() + 1e-12)).sum()
        assert value == pytest.approx(losses.mean() + factor * fairness, abs=1e-5)
    assert left_out > 0


def test_softmatch_weighs_by_a_gaussian_below_the_mean_of_aligned_answers() -> None:
    m = 0.6
    values = _terms(Consistency(mu=1, method="softmatch", momentum=m), 6)
    mu, variance, answers = 1 / CLASSES, 1.0, np.full(CLASSES, 1 / CLASSES)
    for step, value in enumerate(values):
        weak, strong = map(_softmax, _logits(step))
        answers = m * answers + (1 - m) * weak.mean(0)
        aligned = weak * (1 / CLASSES) / answers
        aligned /= aligned.sum(1, keepdims=True)
        top = aligned.max(1)
        mu, variance = m * mu + (1 - m) * top.mean(), m * variance + (1 - m) * top.var(ddof=1)
        weights = np.where(top >= mu, 1.0, np.exp(-((top - mu) ** 2) / (2 * variance / 4)))
        losses = -np.log(strong[np.arange(IMAGES), weak.argmax(1)])  # of answers as they are
        assert value == pytest.approx((weights * losses).mean(), abs=1e-5)


def test_uda_teaches_sharpened_answers_where_they_are_sure() -> None:
    for step, value in enumerate(_terms(Consistency(mu=1, method="uda", threshold=0.7), 4)):
        weak, strong = _logits(step)
        p, q, sharp = _softmax(weak), _softmax(strong), _softmax(weak / 0.4)
        divergence = (sharp * np.log(sharp / q)).sum(1) * (p.max(1) >= 0.7)
        assert value == pytest.approx(divergence.mean(), abs=1e-5)


def test_annealing_leaves_out_what_is_answered_well_until_the_end() -> None:
    for schedule, half in (("linear", 0.5), ("log", 1 - math.exp(-2.5)), ("exp", math.exp(-2.5))):
        assert w.annealed(0.5, 4, schedule) == pytest.approx(half * 0.75 + 0.25)  # type: ignore[arg-type]
    live = gv.wrap(_Answers(), Consistency(method="uda", annealing="linear"))
    live.plan(10)
    logits = torch.tensor([[3.0, 0, 0, 0, 0], [0, 0.1, 0, 0, 0], [0, 0, 0, 0, 0]])
    y = torch.tensor([0, 3, -1])
    loss = live.criterion(F.cross_entropy)
    assert loss(logits, y).item() == pytest.approx(F.cross_entropy(logits[1:2], y[1:2]).item())
    for _ in range(10):
        live.step_end()
    assert loss(logits, y).item() == pytest.approx(F.cross_entropy(logits[:2], y[:2]).item())


@pytest.mark.parametrize("method", ["fixmatch", "freematch", "softmatch", "uda"])
@pytest.mark.parametrize("refresh", [None, 2])
def test_a_batch_without_labels_is_finite(method: Any, refresh: int | None) -> None:
    live = gv.wrap(nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES)), Consistency(
        mu=1, method=method, refresh=refresh, annealing="exp" if method == "uda" else None))  # fmt: skip
    live.feed(unlabeled=[torch.rand(1, 1, 2, 2)])  # one image has no variance
    x, y = live.batch(torch.rand(2, 1, 2, 2), torch.tensor([-1, -1]))
    logits = live.model(x)
    loss = live.criterion(F.cross_entropy)(logits, y) + live.loss(x, y, logits)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in live.model.parameters())


def test_an_image_answered_alike_twice_rests_and_comes_back() -> None:
    kept = KeptAnswers(passes=3)
    positions, yes = torch.tensor([4, 0]), torch.tensor([True, True])
    assert kept.due(positions).tolist() == [True, True]
    kept.put(positions, torch.tensor([1, 1]), yes)
    assert kept.due(positions).tolist() == [True, True]  # answered once
    kept.put(positions, torch.tensor([1, 2]), yes)  # the second image's answer changed
    looks = []
    for _ in range(4):
        looks.append(kept.due(positions).tolist())
        kept.put(positions[looks[-1]], torch.tensor([1, -1])[looks[-1]], yes[looks[-1]])
    assert [a for a, _ in looks] == [False, False, True, False]
    assert all(b for _, b in looks)
    unlearned = KeptAnswers(3)
    for _ in range(3):  # its strong view is answered otherwise
        assert unlearned.due(positions).all()
        unlearned.put(positions, torch.tensor([1, 1]), ~yes)


class _Stream:
    """Images in the same order each time, with their positions."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.read = images, 0

    def positions(self, number: int, times: int) -> Tensor:
        return torch.arange(len(self.images))

    def at(self, number: int, times: int, where: Tensor | None = None) -> Tensor:
        images = self.images if where is None else self.images[where]
        self.read += len(images)
        return images

    def sweep(self) -> Any:
        yield self.images


def test_the_green_variant_computes_strong_views_of_sure_images_alone() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[9.0, 0, 0, 0], [-9.0, 0, 0, 0]]))
    live = gv.wrap(nn.Sequential(nn.Flatten(), linear), Consistency(
        mu=1, threshold=0.9, refresh=2, area=1.0, colour=0.0, weight=0.5))  # fmt: skip
    stream = _Stream(torch.tensor([[1.0] * 4, [0.0] * 4, [-1.0] * 4]).view(3, 1, 2, 2))
    live.feed(unlabeled=stream)
    batch = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    rows, read = [], []
    for step in range(4):
        live.feeds.number = step
        x, y = live.batch(*batch)
        logits = live.model(x)
        term = live.terms(x, y, logits)["consistency"]
        expected = F.cross_entropy(logits[2:], torch.tensor([0, 1])[: len(x) - 2], reduction="sum")
        assert term.item() == pytest.approx(0.5 * expected.item() / 3, abs=1e-6)
        live.step_end()
        rows.append(len(x) - 2)
        read.append(stream.read)
    # both sure images rest at the third step; the one in the middle is asked again and again
    assert rows == [2, 2, 0, 2]
    assert read == [3, 6, 7, 10]
    assert live.facts() == {"consistency_sure": 0.5, "consistency_looked_at": round(10 / 12, 4)}


@pytest.mark.parametrize("method", ["fixmatch", "freematch", "softmatch", "uda"])
def test_the_green_variant_loads_and_answers_no_image_more_than_counts(method: Any) -> None:
    torch.manual_seed(3)
    images = torch.randn(40, 1, 2, 2)
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.mul_(9)
    model = nn.Sequential(nn.Flatten(), linear)
    settings: dict[str, Any] = {"threshold": 0.8} if method in ("fixmatch", "uda") else {}
    live = gv.wrap(model, Consistency(method=method, mu=1, refresh=3, area=1.0, **settings))
    stream, rows = _Stream(images), {True: 0, False: 0}
    live.feed(unlabeled=stream)

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows[output.requires_grad] += len(args[0])

    model.register_forward_hook(count)
    strong = 0
    for step in range(6):
        live.feeds.number = step
        x, y = live.batch(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
        strong += len(x) - 2
        live.loss(x, y, model(x)).backward()
        live.step_end()
    facts = live.facts()
    looked, sure = facts["consistency_looked_at"], facts["consistency_sure"]
    assert rows[False] == stream.read == round(looked * 240)
    assert rows[True] == 12 + strong == 12 + round(sure * 240)
    assert 0 < sure <= looked < 1


def test_soft_weights_are_probabilities_of_a_strong_view() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    images, logits = torch.randn(IMAGES, 1, 2, 2), torch.randn(CLASSES)
    live = gv.wrap(model, Consistency(method="softmatch", mu=1, momentum=0.0, refresh=1))
    live.feed(unlabeled=[images])
    means = w.SoftMatch(CLASSES, 0.0, torch.device("cpu"))
    weak = model(images).softmax(1).detach()
    means.observe(weak)
    share = means.weights(weak)
    losses = -logits.log_softmax(0)[weak.argmax(1)]
    terms, draws = [], 600
    for _ in range(draws):
        x, y = live.batch(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
        terms.append(live.terms(x, y, logits.expand(len(x), -1))["consistency"].item())
        live.step_end()
    deviation = (share * (1 - share) * losses.square()).sum().sqrt().item() / IMAGES
    assert 0 < share.min() < share.max() == 1
    assert np.mean(terms) == pytest.approx(
        (share * losses).mean().item(), abs=4 * deviation / math.sqrt(draws)
    )


def test_without_positions_nothing_rests_and_norms_see_no_weak_view() -> None:
    images = data.load(data.DataSpec(name="digits", train=40, test=10)).train
    x, y = images.batch(range(8))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    live = gv.wrap(model, Consistency(mu=1, threshold=0.0, refresh=5))
    live.feed(unlabeled=[images.batch(range(8, 16))[0]])
    statistics = {k: v.clone() for k, v in model[1].state_dict().items()}
    for _ in range(4):
        batch, labels = live.batch(x, y)
        assert all(torch.equal(v, statistics[k]) for k, v in model[1].state_dict().items())
        assert model.training
        assert len(batch) == 16
        live.terms(batch, labels, torch.zeros(16, 10).scatter(1, torch.zeros(16, 1).long(), 9.0))
        live.step_end()
    assert live.facts()["consistency_looked_at"] == 1.0
