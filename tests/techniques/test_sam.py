"""Sharpness-aware steps against the formula, and what they leave alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches, resumed_and_not
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.layers import Layers
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques._shared.ascent import ascent
from greenvis.techniques.data.generalise.sam import Sam

X = torch.randn(13, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(13) % 3
PLAIN = {"lr": 0.3, "optimizer": "sgd", "momentum": 0, "weight_decay": 0, "schedule": "constant"}


def _net(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)
    )


def _gradients(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> dict[str, Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _step(live: gv.Wrapped, lr: float = 0.3, x: Tensor = X, y: Tensor = Y) -> None:
    optimizer = torch.optim.SGD(live.param_groups(lr), lr=lr)
    x, y = live.batch(x, y)

    def closure() -> None:
        outputs = live.model(x)
        (F.cross_entropy(outputs, y) + live.loss(x, y, outputs)).backward()

    closure()
    live.again(closure)
    optimizer.step()
    live.step_end()
    optimizer.zero_grad()


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_is_that_of_the_papers_algorithm(adaptive: bool) -> None:
    """Algorithm 1 by hand, over the flat vector of all weights; adaptive: with T = |w|."""
    rho, lr = 0.4, 0.3
    mine: Any = _net()
    first = torch.cat([g.flatten() for g in _gradients(mine).values()])
    w = torch.cat([p.detach().flatten() for p in mine.parameters()])
    step = rho * first / first.norm()
    if adaptive:
        step = rho * w.abs() * (w.abs() * first) / (w.abs() * first).norm()
    worst: Any = _net()
    torch.nn.utils.vector_to_parameters(w + step, worst.parameters())
    second = torch.cat([g.flatten() for g in _gradients(worst).values()])

    live = gv.wrap(_net(), Sam(rho=rho, adaptive=adaptive))
    _step(live, lr)
    got = torch.cat([p.detach().flatten() for p in live.model.parameters()])
    assert torch.allclose(got, w - lr * second, atol=1e-6)
    assert not torch.allclose(got, w - lr * first, atol=1e-4)


def test_the_step_is_rho_long_whatever_the_gradients_size() -> None:
    gradients = {"a": torch.randn(3, 2) * 1e4, "b": torch.randn(5) * 1e-3}
    weights = {"a": torch.randn(3, 2), "b": torch.randn(5)}
    step = ascent(gradients, weights, 0.05)
    assert torch.cat([s.flatten() for s in step.values()]).norm().item() == pytest.approx(0.05)
    none = ascent({k: 0 * g for k, g in gradients.items()}, weights, 0.05)
    assert all(s.abs().max() == 0 for s in none.values())


def test_batch_norms_track_the_first_forward_alone_and_dropout_draws_alike() -> None:
    live, plain = gv.wrap(_net(0.5), Sam(rho=0.5)), _net(0.5)
    torch.manual_seed(3)
    _step(live)
    after = torch.rand(1)
    torch.manual_seed(3)
    _gradients(plain)
    assert torch.equal(torch.rand(1), after)  # the second forward drew nothing of its own
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, live.model.get_buffer(name))
    tiny = gv.wrap(_net(0.5), Sam(rho=1e-7))  # as good as no step: the same mask, the same gradient
    torch.manual_seed(3)
    _step(tiny)
    model = _net(0.5)
    torch.manual_seed(3)
    expected = _gradients(model)
    for name, p in model.named_parameters():
        moved = p.detach() - 0.3 * expected[name]
        assert torch.allclose(tiny.model.get_parameter(name), moved, atol=1e-5)


def test_what_is_frozen_stays_where_it_is() -> None:
    live = gv.wrap(_net(), [Sam(rho=0.5), Layers(of=("4",))])
    before = copy.deepcopy(live.model.state_dict())
    _step(live)
    changed = {n for n, v in live.model.state_dict().items() if not torch.equal(v, before[n])}
    assert {n for n, p in live.model.named_parameters() if n in changed} <= set(live.trainable)
    assert changed & set(live.trainable)


def test_a_gradient_that_is_not_finite_is_left_to_be_seen() -> None:
    live = gv.wrap(_net(), Sam())
    before = copy.deepcopy(live.model.state_dict())
    F.cross_entropy(live.model(X * float("inf")), Y).backward()
    live.again(lambda: pytest.fail("there is nothing to run again"))
    assert all(
        torch.equal(v, before[n]) for n, v in live.model.state_dict().items() if "1." not in n
    )
    assert not all(p.grad.isfinite().all() for p in live.model.parameters() if p.grad is not None)


def test_a_recipes_loop_runs_it_and_a_resumed_one_alike(tmp_path: Path) -> None:
    spec = TrainSpec(epochs=2, checkpoint_every_s=1e-9, batch_size=13, **PLAIN)

    def fit(batches: Any, checkpoint: Path | None = None) -> nn.Module:
        part = of_batches(batches, 3, lambda: [(X, Y)], spec, [Sam(rho=0.4)])
        with gv.track("sam", dir=tmp_path) as run:
            return loop.run(Own(lambda: _net(0.3), [part], 3, checkpoint), run).live.model

    def epoch(number: int, start: int) -> list[Any]:
        return [(X + number, Y)] * (3 - start)

    resumed, uninterrupted = resumed_and_not(fit, epoch, tmp_path / "c.pt")
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    by_hand: Any = gv.wrap(_net(), Sam(rho=0.4))
    one = of_batches(lambda e, s: [(X, Y)], 1, lambda: [(X, Y)], TrainSpec(epochs=1, **PLAIN),
                     [Sam(rho=0.4)])  # fmt: skip
    with gv.track("one", dir=tmp_path) as run:
        model = loop.run(Own(_net, [one]), run).live.model
    _step(by_hand)
    for name, value in by_hand.model.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6)


def test_a_loop_that_does_not_offer_the_backward_again_is_told() -> None:
    live = gv.wrap(_net(), Sam())
    F.cross_entropy(live.model(X), Y).backward()
    with pytest.raises(
        GreenvisError, match=r"sam.* runs the backward .* call live\.again\(closure\)"
    ):
        live.step_end()
    live.again(lambda: F.cross_entropy(live.model(X), Y).backward())
    live.step_end()


class _Twice(Sam):
    """Another that wants the step again."""

    name = "twice"


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'sam', 'twice' each run the backward of a step again"):
        gv.wrap(_net(), [Sam(), _Twice()])
    with pytest.raises(BadInput, match=r"rho"):
        Sam(rho=0.0)
    for options, says in (({"accumulate": 2}, "accumulate=2"), ({"precision": "fp16"}, "bf16")):
        spec = TrainSpec(epochs=1, **PLAIN).model_copy(update=options)
        part = of_batches(lambda e, s: [(X, Y)], 1, lambda: [(X, Y)], spec, [Sam()])
        if options == {"precision": "fp16"} and not torch.cuda.is_available():
            from greenvis.experiment.step import check_again

            with pytest.raises(BadInput, match=says):
                check_again(gv.wrap(_net(), Sam()), spec)
            continue
        with pytest.raises(BadInput, match=says), gv.track("sam", dir=tmp_path) as run:
            loop.run(Own(_net, [part]), run)


def test_trainers_that_run_the_step_themselves_refuse_it(tmp_path: Path) -> None:
    from greenvis.integrations import accelerate, lightning, transformers

    for made in (
        lambda live: lightning.GreenCallback(live, "n", dir=tmp_path),
        lambda live: transformers.GreenCallback(live, "n", dir=tmp_path),
        lambda live: accelerate.GreenAccelerator(live, cpu=True, gradient_accumulation_steps=2),
    ):
        with pytest.raises(BadInput, match="'sam' runs the backward of each step again"):
            made(gv.wrap(_net(), Sam()))
