"""Experts of different tasks in one student: the loss by formula, scales that make experts count
alike, their state, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques.inference.distill.fusion import Fusion, Scale
from greenvis.testing import default_hosts

HOST = default_hosts()[0]


def _expert(outputs: int, factor: float) -> nn.Module:
    torch.manual_seed(outputs)
    head = nn.Linear(3 * 32 * 32, outputs)
    head.weight.data *= factor
    return nn.Sequential(nn.Flatten(), head)


def _experts() -> dict[str, Any]:
    return {"small": _expert(3, 1.0), "loud": {"model": _expert(7, 100.0), "weight": 0.5}}


def _x(seed: int = 0) -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_terms_are_distances_to_answers_of_mean_0_and_one_scale() -> None:
    model, experts = HOST.build(), _experts()
    live = gv.wrap(model, Fusion(experts=experts))
    installed: Any = live.installed[0]
    first, second = _x(0), _x(1)
    live.terms(first, None, None)
    terms = live.terms(second, None, None)
    features = installed.representation(second)
    for name, expert, weight in (
        ("small", experts["small"], 1.0), ("loud", experts["loud"]["model"], 0.5)
    ):  # fmt: skip
        with torch.no_grad():
            every = expert(torch.cat([first, second])).double()
        scale = every.var(0, correction=0).mean().sqrt()
        wanted = ((every[6:] - every.mean(0)) / scale).float()
        got = installed.heads[name](features)
        loss = weight * sum((a - b) ** 2 for a, b in zip(got.T, wanted.T, strict=True)).mean()
        torch.testing.assert_close(
            terms[f"fusion_{name}"], loss / got.shape[1], atol=1e-5, rtol=1e-4
        )
    live.undo()


def test_an_expert_that_answers_in_larger_numbers_counts_no_more() -> None:
    scale, loud = Scale(4), Scale(4)
    answers = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 5)
    for part in answers.split(17):
        scale.add(part)
        loud.add(1000 * part + 5)
    torch.testing.assert_close(scale(answers), loud(1000 * answers + 5), atol=1e-4, rtol=1e-4)
    assert scale(answers).mean(0).abs().max() < 1e-5
    # knowing nothing costs 1
    assert scale(answers).square().mean() == pytest.approx(1.0, abs=1e-5)
    constant = Scale(2)
    constant.add(torch.ones(3, 2))
    assert bool(constant(torch.ones(3, 2)).isfinite().all())


def test_what_it_counted_is_taken_up_again_and_undone() -> None:
    model, start = HOST.build(), HOST.build()
    live = gv.wrap(model, Fusion(experts=_experts()))
    live.terms(_x(), None, None)
    state = live.installed[0].state_dict()
    again = gv.wrap(HOST.build(), Fusion(experts=_experts()))
    again.installed[0].load_state_dict(state)
    for key, value in again.installed[0].state_dict().items():
        assert torch.equal(value, state[key])
    assert set(live.trainable) > {n for n in live.trainable if "fusion" in n} > set()
    merged = live.merge()
    assert [*merged.state_dict()] == [*start.state_dict()]
    live.undo()
    for value, before in zip(model.state_dict().values(), start.state_dict().values(), strict=True):
        assert torch.equal(value, before)


def test_runs_stand_for_experts_and_what_is_none_is_refused() -> None:
    request = Fusion(experts={"one": "run:clothes/plain", "other": {"model": "run:digit"}})
    assert request.runs() == {"experts.one": "run:clothes/plain", "experts.other": "run:digit"}
    made = request.with_runs({"experts.one": _expert(3, 1.0), "experts.other": _expert(2, 1.0)})
    gv.wrap(HOST.build(), made).undo()
    with pytest.raises(BadInput, match="only a recipe can resolve it"):
        gv.wrap(HOST.build(), request)
    with pytest.raises(BadInput, match="experts"):
        Fusion(experts={})
    model = HOST.build()
    with pytest.raises(BadInput, match="shares"):
        gv.wrap(model, Fusion(experts={"itself": model}))
    with pytest.raises(BadInput, match="give the `size`"):
        gv.wrap(model, Fusion(experts={"large": nn.Sequential(nn.Flatten(), nn.Linear(5, 2))}))
    maps = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(BadInput, match="one answer for an image"):
        gv.wrap(model, Fusion(experts={"maps": maps}))
    assert maps.training
    with pytest.raises(BadInput, match="first stage"):
        gv.wrap(model, Fusion(experts=_experts()), task="bags")
