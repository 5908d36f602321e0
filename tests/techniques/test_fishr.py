"""The variance of the classifier's gradients against gradients of one sample at a time, and how a
sample's domain reaches a technique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches, resumed_and_not
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.data.spec import DataSpec
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.data.generalise.fishr import Fishr, gradient_variance, spread

X = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(13) % 3
DOMAINS = torch.tensor([0, 2, 0, 0, 2, 1, 1, 2, 0, 2, 1, -1, 3])  # of 3 there is one alone


def _fishr(**fields: Any) -> Fishr:
    return Fishr(**{"input_shape": (1, 4, 4), **fields})


def _net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 3, bias=bias))


def _explicit(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The variance of gradients, each of its own backward: (parameters,), with a graph."""
    each = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model[3].parameters()), create_graph=True)
        each.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(each)
    return (rows - rows.mean(0)).square().mean(0)


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_the_variance_of_explicit_gradients(bias: bool) -> None:
    model = _net(bias)
    features = model[:3](X)
    residuals = model(X).softmax(1) - F.one_hot(Y, 3)
    got = gradient_variance(features, residuals, bias)
    parts = [got[:, :7].flatten(), got[:, 7:].flatten()]
    assert torch.allclose(torch.cat(parts), _explicit(model, X, Y), atol=1e-5)


def test_the_penalty_and_its_gradient_over_steps_are_those_of_the_definition() -> None:
    decay, weight = 0.9, 20.0
    live, plain = gv.wrap(_net(), _fishr(weight=weight, decay=decay, warmup=0.0)), _net()
    averages: dict[int, Tensor] = {}
    for step in range(3):
        x = X + step
        live.set_domains(DOMAINS)
        term = live.terms(x, Y, live.model.train()(x))["fishr"]
        variances = []
        for domain in (0, 1, 2):
            rows = domain == DOMAINS
            now = _explicit(plain, x[rows], Y[rows])
            mean = decay * averages.get(domain, torch.zeros_like(now)) + (1 - decay) * now
            averages[domain] = mean.detach()
            variances.append(mean / (1 - decay))
        center = torch.stack(variances).mean(0)
        expected = weight * torch.stack([(v - center).square().mean() for v in variances]).mean()
        assert term.item() == pytest.approx(expected.item(), rel=1e-4)
        live.model.zero_grad()
        plain.zero_grad()
        term.backward()
        expected.backward()
        for name, parameter in plain.named_parameters():
            got = live.model.get_parameter(name).grad
            assert got is not None
            assert parameter.grad is not None
            assert torch.allclose(got, parameter.grad, atol=1e-5), name
        live.step_end()
    state = live.state_dict()
    assert sorted(k.rpartition(".")[2] for k in state if "fishr" in k) == ["0", "1", "2", "steps"]


def test_domains_that_vary_alike_cost_nothing_and_a_missing_one_stays() -> None:
    assert spread(torch.ones(3, 4, 5)) == 0
    live = gv.wrap(_net(), _fishr(warmup=0.0, decay=0.5))
    twice, labels = torch.cat([X, X]), torch.cat([Y, Y])
    live.set_domains(torch.arange(26) // 13)
    term = live.terms(twice, labels, live.model.train()(twice))["fishr"]
    assert term.item() == pytest.approx(0.0, abs=1e-4)
    live.step_end()
    live.set_domains(torch.zeros(13, dtype=torch.int64))  # the other is as it was
    assert live.terms(X + 1, Y, live.model(X + 1))["fishr"].item() > 0
    alone = gv.wrap(_net(), _fishr(warmup=0.0))
    alone.set_domains(torch.zeros(13, dtype=torch.int64))
    assert alone.terms(X, Y, alone.model.train()(X)) == {}


def test_it_begins_after_its_share_of_the_steps() -> None:
    live = gv.wrap(_net(), _fishr(warmup=0.5))
    live.plan(4)
    for step in range(4):
        live.set_domains(DOMAINS)
        assert bool(live.terms(X, Y, live.model.train()(X))) == (step >= 2)
        live.step_end()


def test_a_recipes_images_say_their_domain() -> None:
    spec = DataSpec(
        name="digits", train=60, test=20, domains={"train": ["plain", "invert", "noise"]}
    )
    images = data.load(spec, seed=3)
    domains = images.train.domains
    assert domains.bincount().tolist() == [20, 20, 20]
    x, _ = images.train.batch(torch.arange(60))
    means = [x[domains == d].mean().item() for d in range(3)]
    assert means[1] == max(means)  # the negative of dark images is bright
    assert data.load(
        DataSpec(name="digits", train=60, test=20)
    ).train.domains.unique().tolist() == [0]
    part = images.train.take(torch.arange(0, 60, 2))
    assert len(part.domains) == 30


def test_a_resumed_recipe_is_an_uninterrupted_one(tmp_path: Path) -> None:
    spec = TrainSpec(epochs=2, checkpoint_every_s=1e-9, batch_size=13, lr=0.1, optimizer="sgd")

    def fit(batches: Any, checkpoint: Path | None = None) -> nn.Module:
        request = _fishr(weight=5.0, warmup=0.2)
        part = of_batches(batches, 3, lambda: [(X, Y)], spec, [request])
        vars(part)["domains"] = DOMAINS
        with gv.track("fishr", dir=tmp_path) as run:
            return loop.run(Own(_net, [part], 3, checkpoint), run).live.model

    def epoch(number: int, start: int) -> list[Any]:
        order = torch.arange(13).roll(number)
        return [(X[order], Y[order], order)] * (3 - start)

    resumed, uninterrupted = resumed_and_not(fit, epoch, tmp_path / "c.pt")
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    live = gv.wrap(_net(), _fishr(warmup=0.0))
    with pytest.raises(GreenvisError, match=r"live\.set_domains\(domains\)"):
        live.terms(X, Y, live.model.train()(X))
    live.set_domains(DOMAINS)
    with pytest.raises(GreenvisError, match="did not see"):
        live.terms(X, Y, live.model(X)[:12])
    late = gv.wrap(_net(), _fishr())
    late.set_domains(DOMAINS)
    with pytest.raises(GreenvisError, match=r"live\.plan\(steps\)"):
        late.terms(X, Y, late.model.train()(X))
    spec = TrainSpec(epochs=1)
    part = of_batches(lambda e, s: [(X, Y)], 1, lambda: [(X, Y)], spec, [_fishr()])
    with (
        pytest.raises(BadInput, match=r"'fishr' .* this data has one"),
        gv.track("fishr", dir=tmp_path) as run,
    ):
        loop.run(Own(_net, [part]), run)
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten())
    with pytest.raises(BadInput):
        gv.wrap(conv, _fishr(input_shape=(1, 3, 3)))
