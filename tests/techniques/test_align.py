"""Alignment of two domains' features against the papers' formulas, written otherwise."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.data.adapt import _alignment as losses

S = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
T = 1.5 * torch.randn(5, 4, generator=torch.Generator().manual_seed(2)) + 0.5
X, Y = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 3
METHODS = ("dann", "cdan", "mmd", "coral")


def _net() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def test_mmd_is_the_sum_over_pairs_of_five_kernels() -> None:
    def squared(a: Tensor, b: Tensor) -> float:
        return sum((p - q) ** 2 for p, q in zip(a.tolist(), b.tolist(), strict=True))

    both = torch.cat([S, T])
    pairs = [squared(a, b) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    mean = sum(pairs) / len(pairs)

    def k(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-squared(a, b) / (mean * w)) for w in (0.25, 0.5, 1, 2, 4))

    def average(a: Tensor, b: Tensor) -> float:
        return sum(k(p, q) for p, q in product(a, b)) / (len(a) * len(b))

    expected = average(S, S) + average(T, T) - 2 * average(S, T)
    assert losses.mmd(S, T).item() == pytest.approx(expected, abs=1e-5)
    assert losses.mmd(S, S).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.mmd(torch.ones(3, 2), torch.ones(3, 2)).isfinite()


def test_the_width_of_the_kernels_has_no_gradient() -> None:
    """The gradient is that of the kernels at a width held fixed: a difference quotient."""
    x = S.double().clone().requires_grad_(True)
    losses.mmd(x, T.double()).backward()
    both = torch.cat([S, T]).double()
    width = (torch.cdist(both, both) ** 2).sum() / (len(both) * (len(both) - 1))

    def fixed(s: Tensor) -> Tensor:
        def k(a: Tensor, b: Tensor) -> Tensor:
            d = torch.cdist(a, b) ** 2
            return sum((-d / (width * w)).exp().mean() for w in (0.25, 0.5, 1, 2, 4))  # type: ignore[return-value]

        return k(s, s) + k(T.double(), T.double()) - 2 * k(s, T.double())

    step = torch.zeros_like(S, dtype=torch.float64)
    step[2, 1] = 1e-5
    slope = (fixed(S.double() + step) - fixed(S.double() - step)) / 2e-5
    assert x.grad is not None
    assert x.grad[2, 1].item() == pytest.approx(slope.item(), abs=1e-5)


def test_coral_is_the_distance_of_covariances_over_four_dim_squared() -> None:
    expected = (torch.cov(S.T) - torch.cov(T.T)).square().sum().item() / (4 * 16)
    assert losses.coral(S, T).item() == pytest.approx(expected, abs=1e-5)


def test_the_gradient_is_reversed_and_grows() -> None:
    x = S.clone().requires_grad_(True)
    losses.reverse_gradient(x, 0.3).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, -0.6 * S, atol=1e-6)
    for p in (0.0, 0.2, 1.0):
        expected = 2 / (1 + math.exp(-10 * p)) - 1
        assert losses.reversal_at(p) == pytest.approx(expected, abs=1e-6)
    assert losses.reversal_at(0.0) == 0.0


def test_cdan_sees_features_by_class_of_answers_without_gradient() -> None:
    logits = torch.randn(7, 3, requires_grad=True)
    seen = losses.outer(S, logits)
    by_hand = torch.stack([torch.outer(p, f).flatten() for p, f in zip(logits.softmax(1), S,
                                                                       strict=True)])  # fmt: skip
    assert torch.allclose(seen, by_hand, atol=1e-6)
    assert not seen.requires_grad
    # the randomised product keeps inner products on average: <outer, outer> for two images
    generator = torch.Generator().manual_seed(0)
    size = (1, 40_000)
    random = (torch.randn(4, size[1], generator=generator), torch.randn(3, size[1],
                                                                        generator=generator))  # fmt: skip
    mixed = losses.outer(S, logits, random)
    assert mixed.shape == (7, size[1])
    assert torch.allclose(mixed @ mixed.T, seen @ seen.T, atol=0.1 * float((seen @ seen.T).max()))
    wide = gv.Align(method="cdan", hidden=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1500), nn.ReLU(), nn.Linear(1500, 3))
    live = gv.wrap(model, wide)  # 3 classes x 1,500 features are beyond 4,096
    assert live.installed[0].discriminator[0].in_features == 1024  # type: ignore[attr-defined]


def test_each_domain_is_half_of_the_discriminators_loss() -> None:
    scores, weights = torch.randn(12), torch.rand(12)
    ours = losses.domain_loss(scores, 7, weights).item()
    source = (weights[:7] * F.softplus(-scores[:7])).sum() / weights[:7].sum()
    target = (weights[7:] * F.softplus(scores[7:])).sum() / weights[7:].sum()
    assert ours == pytest.approx(((source + target) / 2).item(), abs=1e-6)
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    h = [-sum(q * math.log(q) for q in row) for row in p.tolist()]
    expected = [1 + math.exp(-value) for value in h]
    assert torch.allclose(losses.surety(p.log()), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_source_and_target_are_one_forward_and_the_term_is_of_their_features(method: Any) -> None:
    own = {"hidden": 8} if method in ("dann", "cdan") else {}
    live = gv.wrap(_net(), gv.Align(method=method, weight=0.5, **own))
    live.feed(target=[2 * X + 1])
    live.plan(10)
    images, labels = live.batch(X, Y)
    assert torch.equal(images, torch.cat([X, 2 * X + 1]))
    assert labels.tolist() == [*Y.tolist(), *[-1] * 6]
    model: Any = live.model
    outputs = model(images)
    task = live.criterion(F.cross_entropy)(outputs, labels)
    assert task.item() == pytest.approx(F.cross_entropy(outputs[:6], Y).item(), abs=1e-6)
    term = live.terms(images, labels, outputs)["align"]
    with torch.no_grad():  # the features of one batch norm statistic
        features = model[4](model[3](model[2](F.batch_norm(
            model[0](images), None, None, model[1].weight, model[1].bias, True))))  # fmt: skip
        if method in ("mmd", "coral"):
            expected = getattr(losses, method)(features[:6], features[6:])
        else:
            seen = features if method == "dann" else losses.outer(features, outputs)
            scores = live.installed[0].discriminator(seen).squeeze(1)  # type: ignore[attr-defined]
            expected = losses.domain_loss(scores, 6)
    assert term.item() == pytest.approx(0.5 * expected.item(), abs=1e-5)
    (task + term).backward()
    live.step_end()
    assert live.installed[0].state_dict()["steps"] == 1
    keys = list(_net().state_dict())
    assert list(live.merge().state_dict()) == keys


def test_the_features_reversal_follows_the_training() -> None:
    live = gv.wrap(_net(), gv.Align(hidden=8))
    live.feed(target=[2 * X + 1])
    live.plan(2)
    gradients = []
    for _ in range(2):
        images, labels = live.batch(X, Y)
        live.model.zero_grad()
        live.loss(images, labels, live.model(images)).backward()
        gradients.append(live.model[0].weight.grad.abs().sum().item())  # type: ignore[index,union-attr]
        live.step_end()
    assert gradients[0] == 0.0
    assert gradients[1] > 0


def test_what_does_not_fit_is_refused() -> None:
    live = gv.wrap(_net(), gv.Align())
    with pytest.raises(GreenvisError, match=r"live\.feed\(target=loader\)"):
        live.batch(X, Y)
    with pytest.raises(BadInput, match="one class each"):
        live.batch(X, F.one_hot(Y, 3).float())
    live.feed(target=[X])
    images, labels = live.batch(X, Y)
    with pytest.raises(GreenvisError, match="call the model on what batch"):
        live.terms(images, labels, torch.zeros(12, 3))
    with pytest.raises(BadInput, match="'entropy' changes nothing with method"):
        gv.Align(entropy=True)
