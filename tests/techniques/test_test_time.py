"""Adaptation as a model answers: the papers' formulas, and a guard that notices when it fails."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.entropy import entropy, entropy_of
from greenvis.techniques.data.test_time._guard import Guard
from greenvis.techniques.data.test_time._losses import anchor, eata_weights, weighted_entropy

X = torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def _net(group: bool = False) -> Any:
    torch.manual_seed(5)
    norms = [nn.GroupNorm(1, 2), nn.GroupNorm(2, 6)] if group else []
    first, second = norms or [nn.BatchNorm2d(2), nn.BatchNorm2d(6)]
    return nn.Sequential(
        first, nn.Conv2d(2, 6, 3), second, nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


def _sharpened(factor: float = 12.0) -> Any:
    """A net whose answers are sure of something."""
    model = _net()
    with torch.no_grad():
        model[5].weight.mul_(factor)
    return model


def _served(live: gv.Wrapped, batches: Any = None) -> list[Tensor]:
    with torch.inference_mode(), live.served() as model:  # as evaluations run
        model.eval()
        return [model(x).clone() for x in (X.split(8) if batches is None else batches)]


def _affine(model: Any) -> list[nn.Parameter]:
    return [p for m in (model[0], model[2]) for p in m.parameters()]


def test_each_batch_is_answered_before_the_step_it_teaches() -> None:
    """By hand: statistics of the batch, entropy, SGD with momentum on scale and shift alone."""
    lr, momentum = 0.05, 0.5
    answers = _served(gv.wrap(_net(), gv.TestTime(lr=lr, momentum=momentum, guard=False)))
    mine = _net()
    optimizer = torch.optim.SGD(_affine(mine), lr=lr, momentum=momentum)
    for x, got in zip(X.split(8), answers, strict=True):
        logits = mine(x)
        assert torch.allclose(got, logits, atol=1e-5)
        p = logits.softmax(1)
        optimizer.zero_grad()
        (-(p * p.log()).sum(1).mean()).backward()
        optimizer.step()
    assert torch.allclose(entropy(torch.zeros(2, 7)), torch.tensor(7.0).log().repeat(2))
    assert entropy_of(torch.tensor([0.0, 1.0])).item() == pytest.approx(0.0, abs=1e-6)


def test_eata_takes_sure_answers_unlike_those_before() -> None:
    """Image by image in plain Python; equations 3 to 6."""
    logits = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 4.0, 0], [8.0, 0, 1], [0, 0.0, 6.0]])
    mean = torch.tensor([0.9, 0.05, 0.05])
    e0, d = 0.4 * math.log(3), 0.5
    expected, taken = [], []
    for row in logits.softmax(1).tolist():
        h = -sum(p * math.log(p) for p in row)
        norm = math.sqrt(sum(p * p for p in row)) * mean.norm().item()
        cosine = sum(p * q for p, q in zip(row, mean.tolist(), strict=True)) / norm
        chosen = h < e0 and abs(cosine) < d
        expected.append(math.exp(e0 - h) if chosen else 0.0)
        taken += [row] if chosen else []
    weights, after = eata_weights(logits, mean, 0.4, d)
    assert torch.allclose(weights, torch.tensor(expected), atol=1e-5)
    assert (weights > 0).tolist() == [False, False, True, False, True]
    assert after is not None
    assert torch.allclose(after, 0.9 * mean + 0.1 * torch.tensor(taken).mean(0), atol=1e-6)
    first, start = eata_weights(logits, None, 0.4, d)  # nothing came before: none is redundant
    assert (first > 0).tolist() == [True, False, True, True, True]
    assert start is not None
    assert torch.allclose(start, logits.softmax(1)[first > 0].mean(0))
    loss = weighted_entropy(logits, weights)
    assert loss is not None
    by_hand = sum(w * h for w, h in zip(expected, entropy(logits).tolist(), strict=True)) / 2
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    none, unchanged = eata_weights(torch.zeros(4, 3), mean, 0.4, d)
    assert not none.any()
    assert unchanged is mean
    assert weighted_entropy(torch.zeros(4, 3), none) is None


def test_eata_stays_near_what_matters_for_the_source() -> None:
    live = gv.wrap(_sharpened(), gv.TestTime(method="eata", lr=0.01, guard=False, anchor=50.0,
                                             redundant=1.0, momentum=0.0))  # fmt: skip
    assert live.calibrate([(X[:5], Y[:5]), (X[5:12], Y[5:12])]) == {"test_time": {"images": 12}}
    mine = _sharpened().eval()
    fisher = [torch.zeros_like(p) for p in _affine(mine)]
    for x in (X[:5], X[5:12]):
        logits = mine(x)
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), _affine(mine))
        fisher = [f + g.square() / 2 for f, g in zip(fisher, gradients, strict=True)]
    stored = live.state_dict()
    for i, expected in enumerate(fisher):
        got = next(v for n, v in stored.items() if n.endswith(f"fisher.{i}"))
        assert torch.allclose(got, expected, atol=1e-6)
    answers = _served(live)
    mine, source = _sharpened(), [p.detach().clone() for p in _affine(_sharpened())]
    e0 = 0.4 * math.log(3)
    for x, got in zip(X.split(8), answers, strict=True):
        logits = mine.train()(x)
        assert torch.allclose(got, logits, atol=1e-5)
        h = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        sure = h < e0
        assert sure.any()
        loss = ((e0 - h[sure]).exp().detach() * h[sure]).mean()
        far = [(f * (p - s) ** 2).sum() for f, p, s in zip(fisher, _affine(mine), source,
                                                           strict=True)]  # fmt: skip
        assert anchor(_affine(mine), source, fisher).item() == pytest.approx(sum(far).item())  # type: ignore[union-attr]
        gradients = torch.autograd.grad(loss + 50.0 * sum(far), _affine(mine))
        with torch.no_grad():
            for p, g in zip(_affine(mine), gradients, strict=True):
                p.sub_(0.01 * g)
    again = gv.wrap(_sharpened(), gv.TestTime(method="eata", lr=0.01, guard=False, anchor=50.0,
                                              redundant=1.0, momentum=0.0))  # fmt: skip
    again.load_state_dict(stored)
    assert all(map(torch.equal, _served(again), answers))


def test_sar_steps_by_the_gradient_at_the_worst_weights_of_sure_images() -> None:
    rho, lr, e0 = 0.3, 0.05, 0.4 * math.log(3)
    live = gv.wrap(_sharpened(), gv.TestTime(method="sar", lr=lr, rho=rho, momentum=0.0,
                                             guard=False, restart_below=0.0))  # fmt: skip
    answers, mine = _served(live), _sharpened()
    for x, got in zip(X.split(8), answers, strict=True):
        logits = mine(x)
        assert torch.allclose(got, logits, atol=1e-5)
        h = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        first = torch.autograd.grad(h[h < e0].mean(), _affine(mine))
        norm = torch.cat([g.flatten() for g in first]).norm()
        worst = copy.deepcopy(mine)
        with torch.no_grad():
            for p, g in zip(_affine(worst), first, strict=True):
                p.add_(rho * g / norm)
        there = worst(x)
        h2 = -(there.softmax(1) * there.log_softmax(1)).sum(1)
        second = torch.autograd.grad(h2[(h < e0) & (h2 < e0)].mean(), _affine(worst))
        with torch.no_grad():
            for p, g in zip(_affine(mine), second, strict=True):
                p.sub_(lr * g)


def test_sar_begins_again_when_it_gets_too_sure() -> None:
    def run(below: float) -> list[Tensor]:
        request = gv.TestTime(method="sar", lr=0.2, guard=False, restart_below=below)
        return _served(gv.wrap(_sharpened(), request), [X[:8]] * 3)

    always, never = run(10.0), run(0.0)
    assert torch.equal(always[0], always[2])  # the same batch, from the same weights
    assert not torch.equal(never[0], never[2])


def test_trained_weights_come_back_each_so_many_batches() -> None:
    request = gv.TestTime(lr=0.2, guard=False, reset_every=2)
    first, second, third, fourth = _served(gv.wrap(_net(), request), [X[:8]] * 4)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", ["tent", "eata", "sar"])
def test_it_begins_anew_with_the_trained_weights_each_time(method: Any) -> None:
    live = gv.wrap(_net(), [gv.TestTime(method=method, lr=0.5), gv.Ema(decay=0.5)])
    before = copy.deepcopy(live.model.state_dict())
    flags = {n: p.requires_grad for n, p in live.model.named_parameters()}
    first, second = _served(live), _served(live)
    assert all(map(torch.equal, first, second))
    assert not any(a.requires_grad for a in first)
    assert all(torch.equal(v, before[n]) for n, v in live.model.state_dict().items())
    assert {n: p.requires_grad for n, p in live.model.named_parameters()} == flags
    assert "forward" not in vars(live.model)
    with pytest.raises(GreenvisError, match="learns while it answers"):
        live.merge()


def test_a_single_image_is_answered_as_the_model_was_trained() -> None:
    live = gv.wrap(_net(), gv.TestTime(lr=0.5, guard=False))
    plain = live.model.eval()(X[:1])
    answers = _served(live, [X[:1], X[:1], X[:8], X[:1]])
    assert all(torch.equal(answers[i], plain) for i in (0, 1, 3))
    layered = gv.wrap(_net(group=True), gv.TestTime(lr=0.5, guard=False))
    one, two = _served(layered, [X[:1], X[:1]])  # without batch statistics one image teaches
    assert not torch.equal(one, two)


def test_the_guard_tells_unsure_and_narrow_answers() -> None:
    sure, unsure = 9.0 * F.one_hot(Y, 3).float(), 0.5 * F.one_hot(Y, 3).float()
    one_class = 9.0 * F.one_hot(torch.zeros(24, dtype=torch.int64), 3).float()
    guard = Guard(margin=0.1)
    assert guard.trusts(unsure, sure)
    for source, adapted, reason in ((sure, unsure, "unsure"), (sure, sure, "unsure"),
                                    (unsure, one_class, "narrow")):  # fmt: skip
        guard.clear()
        assert not guard.trusts(source, adapted)
        assert guard.reason == reason
    layered = Guard(margin=0.0)
    assert layered.trusts(sure, sure)  # at its first batch a model without batch norms is itself
    assert layered.trusts(one_class, one_class)  # as narrow as the source


def test_where_the_guard_falls_back_the_source_answers_and_its_weights_are_back() -> None:
    """Batches of one repeated image: batch statistics leave nothing of it."""
    batches = [X[i : i + 1].repeat(8, 1, 1, 1) + 0.01 * X[8:16] for i in range(6)]
    live = gv.wrap(_sharpened(), gv.TestTime(lr=0.5))
    source = live.model.eval()
    with torch.no_grad():
        plain = [source(x) for x in batches]
    assert all(map(torch.equal, _served(live, batches), plain))
    row = live.facts()["test_time"][0]
    assert row == {"batches": 6, "unsure": 6, "narrow": 0}
    free = gv.wrap(_sharpened(), gv.TestTime(lr=0.5, guard=False))
    assert not any(map(torch.equal, _served(free, batches), plain))


def test_a_model_given_up_is_looked_at_again() -> None:
    """Pale images: of them the source is unsure, and the statistics of the batch help."""
    live = gv.wrap(_sharpened(), gv.TestTime(lr=1e-4))
    one_image = X[:1].repeat(8, 1, 1, 1) + 0.01 * X[8:16]
    batches = [one_image, *[0.02 * X] * 40]
    with torch.no_grad():
        plain = [live.model.eval()(x) for x in batches]
    answers = _served(live, batches)
    same = [torch.equal(a, b) for a, b in zip(answers, plain, strict=True)]
    row = live.facts()["test_time"][0]
    assert same[:4] == [True] * 4  # given up at the first, looked at again at the fifth
    assert not any(same[-8:])
    assert row == {"batches": 41, "unsure": sum(same), "narrow": 0}


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(BadInput, match="has none"):
        gv.wrap(nn.Sequential(nn.Linear(2, 2)), gv.TestTime())
    with pytest.raises(BadInput, match="'rho' changes nothing with method"):
        gv.TestTime(rho=0.2)
