"""Experts: parts of a perceptron that add up to it, copies that begin as it, and who takes what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import main_output
from greenvis.techniques.inference.experts._clusters import balanced
from greenvis.techniques.inference.experts._routing import Down, Routing, Up, assign
from greenvis.techniques.inference.experts.experts import Experts

MODELS = ["timm-vit", "timm-swin", "timm-convnext", "torchvision-vit", "plain"]


def _answers(model: nn.Module, x: Any) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return main_output(model(x)).clone()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["split", "upcycle"])
def test_it_begins_as_the_dense_model(name: str, form: str) -> None:
    host = HOSTS[name]
    x, _ = host.batch()
    exact = _answers(host.build(), x)
    all_of_them = {"split": [(4, 4)], "upcycle": [(2, 1), (3, 2), (2, 2)]}[form]
    for experts, active in all_of_them:
        model = host.build()
        state = copy.deepcopy(model.state_dict())
        live = gv.wrap(model, Experts(form=form, experts=experts, active=active))
        torch.testing.assert_close(_answers(model, x), exact, atol=2e-6, rtol=1e-5)
        if form == "split":  # every neuron answers: it folds
            live.merge()
            torch.testing.assert_close(_answers(model, x), exact, atol=2e-6, rtol=1e-5)
        live.undo()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_a_token_gets_is_the_sum_of_its_experts() -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(6, 12), nn.Linear(12, 6)
    routing = Routing(6, 4, 2, False, False, up.weight.detach())
    first, last = Up(up, routing, leads=True), Down(down, routing)
    x = torch.randn(2, 5, 6)
    got = last(F.gelu(first(x)))
    router: Any = routing.layer
    best = router(x).topk(2, dim=-1).indices
    hidden = F.gelu(up(x)).unflatten(-1, (4, 3))
    taken = torch.zeros(2, 5, 4).scatter(-1, best, 1.0)
    expected = down((hidden * taken.unsqueeze(-1)).flatten(-2))
    torch.testing.assert_close(got, expected)
    assert sum(routing.load) == 2 * 5 * 2
    alone = last(F.gelu(first(x[:1])))
    torch.testing.assert_close(alone, got[:1])  # no sample hangs on another


def test_copies_are_weighed_by_the_router() -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(6, 12), nn.Linear(12, 6)
    routing = Routing(6, 3, 2, False, True, up.weight.detach())
    first, last = Up(up, routing, leads=True).eval(), Down(down, routing)
    routing.eval()
    for layer in (first, last):
        nn.init.normal_(layer.weight)
    x = torch.randn(7, 6)
    got = last(F.gelu(first(x)))
    router: Any = routing.layer
    shares = router(x).softmax(-1)
    best = shares.topk(2, dim=-1).indices
    ups, downs, biases = first.weight.chunk(3), last.weight.chunk(3, 1), first.bias.chunk(3)
    for i, token in enumerate(x):
        parts = [
            shares[i, e] * (downs[e] @ F.gelu(ups[e] @ token + biases[e]) + down.bias)
            for e in best[i].tolist()
        ]
        expected = torch.stack(parts).sum(0) / shares[i, best[i]].sum()
        torch.testing.assert_close(got[i], expected, atol=1e-5, rtol=1e-4)


def test_routing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10, 4)
    each = assign(logits, 2, choice=False, weigh=True)
    assert sum(each.counts) == 20
    assert each.gates is not None
    sums = torch.zeros(10, 1).index_add(0, each.tokens, each.gates)
    torch.testing.assert_close(sums, torch.ones(10, 1))
    evenly = assign(logits, 1, choice=True, weigh=False)
    best = logits.softmax(1).topk(3, dim=0).indices.T  # ⌈10 · 1 / 4⌉ tokens each
    parts = evenly.tokens.split(evenly.counts)
    assert all(
        {*chosen.tolist()} <= {*part.tolist()} for chosen, part in zip(best, parts, strict=True)
    )
    assert {*evenly.tokens.tolist()} == {*range(10)}  # none is left out
    single = torch.randn(10, 4, requires_grad=True)
    one = assign(single, 1, choice=False, weigh=True)
    assert one.gates is not None
    torch.testing.assert_close(one.gates, torch.ones(10, 1))
    (one.gates * torch.randn(10, 1)).sum().backward()
    assert single.grad is not None
    assert single.grad.abs().sum() > 0


def test_clusters_are_equal_in_size_and_close() -> None:
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(3, 8), dim=1)
    truth = torch.arange(3).repeat(4)
    points = centres[truth] + 0.01 * torch.randn(12, 8)
    labels = balanced(points, 3)
    assert labels.bincount().tolist() == [4, 4, 4]
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 3


def test_the_router_learns_what_the_experts_contribute() -> None:
    host = HOSTS["timm-vit"]
    model = host.build()
    x, y = host.batch()
    live = gv.wrap(model, Experts(experts=4, active=1))
    routers = [p for n, p in model.named_parameters() if ".routing." in n]
    assert {id(p) for p in live.declared.values()} == {id(p) for p in routers}
    for parameter in routers:
        nn.init.normal_(parameter, std=1.0)
    optimizer = torch.optim.Adam(routers, lr=0.05)
    losses = []
    for _ in range(12):
        loss = live.loss(x, y, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    loads = live.facts()["experts"]["loads"]
    assert len(loads) == len(view(HOSTS["timm-vit"].build()).mlps)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("timm-vit", {"experts": 7}, "do not divide into 7"),
        ("timm-vit", {"experts": 2, "active": 3}, "more than the 2 experts"),
        ("timm-vit", {"balance": 0.1}, "balance"),
        ("timm-eva02", {"experts": 4, "active": 4}, "depend on each other"),
        ("timm-resnet", {}, "no multi-layer perceptron"),
        ("timm-vit", {"targets": ["blocks.0.attn.qkv"]}, "no multi-layer perceptron"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.wrap(HOSTS[name].build(), Experts(**options))


def test_expert_choice_is_kept_from_exits() -> None:
    with pytest.raises(BadInput, match="independent of the rest"):
        gv.wrap(
            HOSTS["timm-vit"].build(),
            [Experts(experts=4, active=1, routing="expert_choice"), gv.EarlyExit()],
        )
