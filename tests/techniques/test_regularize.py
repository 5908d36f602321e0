"""EWC, MAS and SI against the libraries' importances, LwF against both libraries' losses, and going
on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience
from greenvis.errors import GreenvisError
from greenvis.techniques.iteration.continual._importance import (
    fisher,
    mas,
    path_importance,
    penalty,
)
from greenvis.techniques.iteration.continual.lwf import lwf_loss

DATA = Path(__file__).parents[1] / "fixtures"
EWC = torch.load(DATA / "ewc_mas.pt", weights_only=True)
LWF = torch.load(DATA / "lwf_loss.pt", weights_only=True)
X, Y = EWC["X"], EWC["Y"]
NAMES = list(EWC["state_dict"])
REQUESTS: list[Any] = [
    lambda: gv.Regularize(weight=3.0), lambda: gv.Regularize(weight=3.0, online=False,
    fisher="batch"),
    lambda: gv.Regularize(method="mas", weight=1.0), lambda: gv.Regularize(method="si", weight=1.0),
    lambda: gv.Lwf(keep=0.3),
]  # fmt: skip


def _net() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    net.load_state_dict(EWC["state_dict"])
    return net


def _loader(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[n], expected[n], atol=1e-6, rtol=1e-4) for n in NAMES)


@pytest.mark.parametrize("size", [1, 8, 24])
def test_fisher_of_batches_equals_avalanches(size: int) -> None:
    assert _same(
        fisher(_net(), NAMES, _loader(size), "batch"), EWC["avalanche"][f"avalanche_bs{size}"]
    )


@pytest.mark.parametrize("size", [1, 5, 24])
def test_fisher_of_samples_does_not_depend_on_batches(size: int) -> None:
    assert _same(fisher(_net(), NAMES, _loader(size), "sample"), EWC["empirical_fisher"])


def test_weighted_fisher_equals_mammoths() -> None:
    found = fisher(_net(), NAMES, _loader(8), "weighted")
    assert torch.allclose(
        torch.cat([found[n].flatten() for n in EWC["flat_order"]]),
        EWC["mammoth_fisher_flat"],
        atol=1e-6,
    )


def test_a_model_without_a_rule_for_batches_of_functions_is_taken_sample_by_sample() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * x.sum().item()

    net = Odd(*_net())
    assert _same(fisher(net, NAMES, _loader(8), "sample"), EWC["empirical_fisher"])


PENALTIES = [
    ("avalanche_bs1", 1, "batch"),
    ("avalanche_bs8", 8, "batch"),
    ("empirical", 8, "sample"),
    ("true", 8, "true"),
]


@pytest.mark.parametrize(("key", "size", "definition"), PENALTIES)
def test_penalty_equals_the_reference(key: str, size: int, definition: Any) -> None:
    importance = fisher(_net(), NAMES, _loader(size), definition)
    found = penalty(EWC["perturbed_params"], importance, EWC["state_dict"])
    assert found.item() == pytest.approx(EWC["penalty_sum_no_lambda"][key], rel=1e-4)


@pytest.mark.parametrize(("size", "definition"), [(1, "batch"), (8, "batch"), (8, "sample")])
def test_mas_equals_avalanches(size: int, definition: Any) -> None:
    assert _same(
        mas(_net(), NAMES, _loader(size), definition),
        EWC["mas"]["bs1" if definition == "sample" else f"bs{size}"],
    )


def test_ewc_of_each_task_is_the_sum_of_their_penalties() -> None:
    net = _net()
    live = gv.wrap(net, gv.Regularize(weight=2.0, online=False))
    expected = []
    for shift in (0.0, 0.2, -0.1):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(shift)
        importance = fisher(net, NAMES, _loader(8))
        expected.append((importance, {n: p.detach().clone() for n, p in net.named_parameters()}))
        live.end_experience(_loader(8))
    now = EWC["perturbed_params"]
    net.load_state_dict(now)
    assert live.loss(X, Y, net(X)).item() == pytest.approx(
        2.0 * sum(penalty(now, *w).item() for w in expected), rel=1e-4
    )


def test_online_ewc_decays_and_holds_to_the_last() -> None:
    net = _net()
    live = gv.wrap(net, gv.Regularize(weight=2.0, decay=0.9, fisher="weighted"))
    assert live.loss(X, Y, net(X)).item() == 0
    first = fisher(net, NAMES, _loader(8), "weighted")
    live.end_experience(_loader(8))
    net.load_state_dict(EWC["perturbed_params"])
    second = fisher(net, NAMES, _loader(8), "weighted")
    live.end_experience(_loader(8))
    net.load_state_dict(EWC["state_dict"])
    both = {n: 0.9 * first[n] + second[n] for n in NAMES}
    expected = 2.0 * penalty(EWC["state_dict"], both, EWC["perturbed_params"])
    assert live.loss(X, Y, net(X)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert net.training


def test_mas_takes_a_share_of_what_was_and_what_is() -> None:
    net = _net()
    live = gv.wrap(net, gv.Regularize(method="mas", fisher="batch"))
    first = mas(net, NAMES, _loader(8))
    live.end_experience(_loader(8))
    net.load_state_dict(EWC["perturbed_params"])
    second = mas(net, NAMES, _loader(8))
    live.end_experience(_loader(8))
    assert _same(live.installed[0].importance, {n: (first[n] + second[n]) / 2 for n in NAMES})  # type: ignore[attr-defined]


def test_si_follows_the_path_of_each_weight() -> None:
    """On a plain quadratic of SGD the path is Σ lr · gradient²."""
    net = _net()
    live = gv.wrap(net, gv.Regularize(method="si", weight=0.5, damping=0.2))
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    path = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in _loader(8):
        (F.cross_entropy(net(x), y) + live.loss(x, y, net(x))).backward()
        for n, p in net.named_parameters():
            path[n] += 0.1 * p.grad.square()
        optimizer.step()
        optimizer.zero_grad()
        live.step_end()
    live.end_experience(_loader(8))
    moved = {n: p.detach() - start[n] for n, p in net.named_parameters()}
    expected = {n: path_importance(path[n], moved[n], 0.2) for n in path}
    at = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.load_state_dict(start)
    assert live.loss(X, Y, net(X)).item() == pytest.approx(
        0.5 * penalty(start, expected, at).item(), rel=1e-4
    )
    assert (path_importance(torch.tensor([-1.0]), torch.tensor([1.0]), 0.1) == 0).all()


@pytest.mark.parametrize("row", range(2))
def test_lwf_equals_both_libraries(row: int) -> None:
    case = LWF["rows"][row]
    new = LWF["new_logits"].clone().requires_grad_(True)
    form: Any = {"avalanche": "kl", "mammoth": "cross_entropy"}[case["impl"]]
    loss = lwf_loss(new, LWF["old_logits"], LWF["active_units"], case["T"], form)
    loss.backward()
    assert torch.allclose(loss, case["loss"], atol=1e-5)
    assert torch.allclose(new.grad, case["grad_new"], atol=1e-6)


def test_lwf_compares_earlier_classes_with_the_earlier_model() -> None:
    net = nn.Sequential(_net(), nn.BatchNorm1d(4))
    live = gv.wrap(net, gv.Lwf(weight=0.5, keep=0.25))
    live.begin_experience(Experience(0, (0, 1), (0, 1)))
    assert live.loss(X, Y, net(X)).item() == 0
    live.end_experience(_loader(8))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    old = net.eval()(X).detach()
    with torch.no_grad():
        net.get_parameter("0.2.bias").add_(torch.arange(4.0))
    live.begin_experience(Experience(1, (2, 3), (0, 1, 2, 3)))
    now = net.train()(X)
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    assert torch.allclose(live.loss(X, Y, now), 0.5 * lwf_loss(now, old, [0, 1]), atol=1e-6)
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers())
    assert all(m.training for m in net.modules())
    live.end_experience(_loader(8))
    assert torch.allclose(
        net.get_parameter("0.2.bias"), before["0.2.bias"] + 0.75 * torch.arange(4.0)
    )


@pytest.mark.parametrize("request_of", REQUESTS)
def test_saved_and_loaded_in_the_middle_of_a_task_it_goes_on_exactly(
    request_of: Any, tmp_path: Path
) -> None:
    def train(live: Any, steps: range) -> None:
        for i in steps:
            if i == 3:
                live.end_experience(_loader(8))
            x, y = _loader(8)[i % 3]
            logits = live.model(x)
            (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
            with torch.no_grad():
                for p in live.model.parameters():
                    p.sub_(0.1 * p.grad)
                    p.grad = None
            live.step_end()
        if steps.stop == 8:
            live.end_experience(_loader(8))

    uninterrupted, first, second = (gv.wrap(_net(), request_of()) for _ in range(3))
    train(uninterrupted, range(8))
    train(first, range(5))
    first.save(tmp_path)
    second.load(tmp_path)
    train(second, range(5, 8))
    one, other = (live.state_dict() for live in (uninterrupted, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("request_of", REQUESTS)
def test_undo_leaves_nothing_behind(request_of: Any) -> None:
    net = _net()
    live = gv.wrap(net, request_of())
    net(X).sum().backward()
    live.loss(X, Y, net(X))
    live.end_experience(_loader(8))
    live.undo()
    assert all(torch.equal(t, EWC["state_dict"][n]) for n, t in net.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


@pytest.mark.parametrize(("weight", "diverges"), [(0.9, False), (1.1, True)])
def test_a_penalty_that_gradient_descent_cannot_follow_is_foretold(
    weight: float, diverges: bool
) -> None:
    """Steps on weight · importance · change² grow from lr · weight · importance = 1 on; the note
    says so beforehand."""
    net = _net()
    live = gv.wrap(net, gv.Regularize(weight=1.0))
    live.end_experience(_loader(8))
    greatest = max(float(v.max()) for v in live.installed[0].importance.values())  # type: ignore[attr-defined]
    lr = 1 / greatest
    live.undo()
    live = gv.wrap(net, gv.Regularize(weight=weight))
    notes: list[str] = []
    live.installed[0].note = notes.append
    optimizer = torch.optim.SGD(live.param_groups(lr), lr)
    live.end_experience(_loader(8))
    assert bool(notes) == diverges
    assert all(f"the greatest is {greatest:.3g}" in note for note in notes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    far: list[float] = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = live.loss(X, Y, net(X))
        loss.backward()
        optimizer.step()
        far.append(loss.item())
    assert (far[-1] > far[5]) == diverges


def test_bad_requests_say_what_to_do() -> None:
    with pytest.raises(gv.BadInput, match="should be 'ewc', 'mas' or 'si'"):
        gv.Regularize(method="ewx")  # type: ignore[arg-type]
    live = gv.wrap(_net(), gv.Lwf())
    live.end_experience(_loader(8))
    with pytest.raises(GreenvisError, match="needs logits"):
        live.loss(X, Y, None)
