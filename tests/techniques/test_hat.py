"""Hard attention to the task: the paper's formulas, units frozen to the bit, and gates that a
test's task sets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from experiences import predict, task, train
from hosts import HOSTS

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.techniques.iteration.continual.hat import (
    Hat,
    InstalledHat,
    compensated,
    sparsity,
    temperature,
)


def _train(live: Wrapped, tasks: range, steps: int = 4, begin: int = 0, end: bool = True) -> None:
    train(live, (3, 32, 32), tasks, steps, begin, end)


def _of(live: Wrapped) -> InstalledHat:
    (installed,) = live.installed
    assert isinstance(installed, InstalledHat)
    return installed


def _shut(live: Wrapped, share: float, seed: int = 0) -> None:
    """Shut a share of the gates, as long training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in _of(live).gates:
            gate.embedding[torch.rand(len(gate.used), generator=generator) < share] = -1.0


def test_the_papers_formulas() -> None:
    assert temperature(0, 5, 400.0) == 1 / 400
    assert temperature(4, 5, 400.0) == 400.0
    assert temperature(2, 5, 400.0) == pytest.approx((400 + 1 / 400) / 2)
    e, s = torch.tensor([0.3, -1.2, 2.0]), 3.0
    want = [400 * (math.cosh(s * v) + 1) / (s * (math.cosh(v) + 1)) for v in e.tolist()]
    assert torch.allclose(compensated(torch.ones(3), e, s, 400.0), torch.tensor(want))
    gates, used = (
        [torch.tensor([0.5, 1.0]), torch.tensor([0.2, 0.4])],
        [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])],
    )
    assert torch.allclose(sparsity(gates, used), torch.tensor((1.0 + 0.2 + 0.4) / 3))
    leaf = e.clone().requires_grad_()
    (
        torch.sigmoid(s * leaf) ** 2
    ).sum().backward()  # compensated: as the gate's own gradient times that of sigmoid(e), ·s_max
    gate = torch.sigmoid(s * e)
    plain = 2 * gate * torch.sigmoid(e) * (1 - torch.sigmoid(e)) * 400.0
    assert leaf.grad is not None
    assert torch.allclose(compensated(leaf.grad, e, s, 400.0), plain, rtol=1e-4)


def test_gates_the_hidden_units() -> None:
    model, (x, _) = HOSTS["timm-vit"].build(), HOSTS["timm-vit"].batch()
    live = wrap(model, Hat(s_max=10.0, anneal_steps=3))
    mlp: Any = model.blocks[0].mlp  # type: ignore[index]
    hidden = torch.randn(2, 5, 128)
    live.batch(x, None)
    for s in (0.1, 5.05, 10.0, 0.1):
        want = F.linear(
            hidden * torch.sigmoid(s * mlp.fc2.hat.embedding), mlp.fc2.weight, mlp.fc2.bias
        )
        assert torch.allclose(mlp.fc2(hidden), want, atol=1e-5)
        live.step_end()
        live.batch(x, None)
    model.eval()
    _shut(live, 0.5)
    want = F.linear(hidden * (mlp.fc2.hat.embedding > 0), mlp.fc2.weight, mlp.fc2.bias)
    assert torch.allclose(mlp.fc2(hidden), want, atol=1e-5)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-swin", "torchvision-vit", "transformers-clip", "plain"]
)
def test_a_task_is_answered_bit_for_bit_as_when_it_ended(name: str) -> None:
    model, (x, _) = HOSTS[name].build(), HOSTS[name].batch()
    live = wrap(model, Hat(anneal_steps=4))
    told = []
    for index in range(3):
        _train(live, range(index, index + 1), end=False)
        _shut(live, 0.7, index)
        live.end_experience([])
        told.append(predict(live, x, index))
        assert torch.equal(predict(live, x), told[-1])
        assert all(torch.equal(predict(live, x, i), then) for i, then in enumerate(told))
    assert (told[0] - told[2]).abs().max() > 1e-3
    shares = live.facts()
    assert 0.2 < shares["hat_shares"][0] < shares["hat_used"] < 1
    assert sum(shares["hat_shares"]) > shares["hat_used"]  # later tasks share units of earlier ones


def test_the_term_shuts_gates_and_free_units_go_on_learning() -> None:
    used = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        model = HOSTS["timm-vit"].build()
        live = wrap(model, Hat(weight=weight, anneal_steps=10, lr_ratio=20.0))
        _train(live, range(1), steps=20)
        used[weight] = live.facts()["hat_used"]
    assert used[5.0] < used[0.0] - 0.1
    fc1: Any = model.blocks[0].mlp.fc1.weight  # type: ignore[index]
    before, gate = fc1.detach().clone(), _of(live).gates[0]
    free = ~gate.used
    assert free.any()
    _train(live, range(1, 2), end=False)
    assert torch.equal(fc1[~free], before[~free])
    assert not torch.equal(fc1[free], before[free])


def test_resumes_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    host, request = HOSTS["timm-vit"], Hat(anneal_steps=3)
    uninterrupted, resumed = (wrap(host.build(), request) for _ in range(2))
    _train(uninterrupted, range(1), end=False)
    _shut(uninterrupted, 0.6)
    uninterrupted.end_experience([])
    _train(uninterrupted, range(1, 2), steps=2, end=False)
    uninterrupted.save(tmp_path)
    for index in range(2):
        resumed.begin_experience(task(index))
    resumed.load(tmp_path)
    for live in (uninterrupted, resumed):
        _train(live, range(1, 2), begin=2)
        torch.manual_seed(5)
        _train(live, range(2, 3))
    x, _ = host.batch()
    for index in (None, 0, 1, 2):
        assert torch.equal(predict(resumed, x, index), predict(uninterrupted, x, index))
    assert resumed.facts() == uninterrupted.facts()


def test_merges_to_the_current_task_and_undoes() -> None:
    host = HOSTS["torchvision-swin"]
    model, (x, _) = host.build(), host.batch()
    before, keys = Snapshot(model), list(model.state_dict())
    live = wrap(model, Hat())
    _train(live, range(1), end=False)
    _shut(live, 0.5)
    live.end_experience([])
    outputs = predict(live, x)
    live.merge()
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), outputs, atol=1e-5)
    live.undo()
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_says_where_no_unit_is_left_and_refuses_nonsense() -> None:
    live = wrap(HOSTS["timm-vit"].build(), Hat())
    live.begin_experience(task(0))
    live.end_experience([])
    with pytest.warns(UserWarning, match="no free unit is left for task 2, which can only choose"):
        live.begin_experience(task(1))
    for wrong in ({"s_max": 1}, {"weight": -1}, {"anneal_steps": 0}, {"gates": 3}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Hat(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="ResNet has none; packnet takes any layer"):
        wrap(HOSTS["timm-resnet"].build(), Hat())
    with pytest.raises(
        BadInput, match="no MLP of Eva has hidden units that can be gated one by one"
    ):
        wrap(HOSTS["timm-eva02"].build(), Hat())
