"""A generator in the buffer's place, and a model trained on the buffer alone: what they learn, cost
and leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience
from greenvis.techniques.iteration.continual._generator import Generator, elbo

TASKS = [
    Experience(0, (0, 1), (0, 1), 3),
    Experience(1, (2,), (0, 1, 2), 3),
    Experience(2, (3,), (0, 1, 2, 3), 3),
]


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 4))


def _images(*classes: int, each: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Batches of 6 × 6 images, each class a bright row of its own, some noise."""
    draw = torch.Generator().manual_seed(classes[0])
    y = torch.tensor(classes).repeat(each)
    x = 0.1 * torch.rand(len(y), 1, 6, 6, generator=draw)
    x[torch.arange(len(y)), 0, y] += 0.9
    return [(x[i : i + 10] - 0.5, y[i : i + 10]) for i in range(0, len(y), 10)]


def _stream(live: Any, tasks: range, *, learn: bool = True) -> None:
    for t in range(tasks.stop):
        live.begin_experience(TASKS[t])
        if t not in tasks:
            continue
        optimizer = torch.optim.SGD(live.param_groups(0.2))
        for given in _images(*TASKS[t].classes) if learn else []:
            x, y = live.batch(*given)
            logits = None if live.pretext else live.model(x)
            own = 0.0 if logits is None else live.criterion(F.cross_entropy)(logits, y)
            (own + live.loss(x, y, logits)).backward()
            optimizer.step()
            live.step_end()
            optimizer.zero_grad()
        live.end_experience(_images(*TASKS[t].classes))


def test_the_bound_is_that_of_the_paper() -> None:
    pixels, drawn = torch.rand(3, 5), torch.randn(3, 5)
    mean, log_var = torch.randn(3, 2), torch.randn(3, 2)
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(
        normal(mean, (log_var / 2).exp()), normal(torch.zeros(3, 2), 1.0)
    ).sum(1)
    likelihood = -F.binary_cross_entropy_with_logits(drawn, pixels, reduction="none").sum(1)
    assert torch.allclose(
        elbo(pixels, drawn, mean, log_var), (divergence - likelihood).mean(), atol=1e-5
    )


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for_also_of_earlier_tasks() -> None:
    generator = Generator(0)
    generator.learn(_images(0, 1), 4, 60, 1.0, torch.device("cpu"))
    generator.learn(_images(2), 4, 60, 1.0, torch.device("cpu"))
    x, y = generator.draw(60)
    assert x.shape == (60, 1, 6, 6)
    assert set(y.tolist()) == {0, 1, 2}
    assert -0.51 <= x.min() < x.max() <= 0.51  # the range of what it saw
    assert (x.mean(3).squeeze(1).argmax(1) == y).float().mean() > 0.9


def test_the_generator_replays_in_training_and_skips_the_last_task(tmp_path: Path) -> None:
    live = gv.wrap(_net(), gv.Replay(source="generator", epochs=40, batch_size=10))
    phases: list[str] = []
    with gv.track("generative", live, dir=tmp_path) as run:
        live.meter(run)
        inner = live.installed[0].phase
        live.installed[0].phase = lambda name: (phases.append(name), inner(name))[1]
        _stream(live, range(2))
        x, y = live.batch(*_images(3)[0])
        assert (len(x), len(y)) == (20, 20)
        assert set(y[10:].tolist()) <= {0, 1, 2}
        live.step_end()
        _stream(live, range(2, 3))
    assert phases == ["generator", "generator"]
    assert live.facts()["generator_classes"] == 3
    assert live.facts()["generator_bytes"] == live.installed[0].generator.nbytes > 0  # type: ignore[attr-defined]
    with torch.no_grad():
        right = [
            float((live.model(x).argmax(1) == y).float().mean())
            for c in range(4)
            for x, y in _images(c)[:1]
        ]
    assert min(right) > 0.8  # of earlier classes, too


@pytest.mark.parametrize("request_", [
    gv.Replay(source="generator", epochs=3, batch_size=5),
    gv.Replay(method="gdumb", policy="greedy", size=12, epochs=4),
])  # fmt: skip
def test_saved_and_loaded_they_go_on_exactly(request_: gv.Replay, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(5)
        model = _net()
        return gv.wrap(model, request_)

    uninterrupted, first = fresh(), fresh()
    _stream(uninterrupted, range(3))
    _stream(first, range(2))
    first.save(tmp_path)
    second = fresh()
    second.load(tmp_path)
    _stream(second, range(2, 3))
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )


def test_gdumb_learns_at_the_end_of_a_task_only_and_from_the_start() -> None:
    live = gv.wrap(_net(), gv.Replay(method="gdumb", policy="greedy", size=12, epochs=30))
    before = [p.clone() for p in _net().parameters()]
    optimizer = torch.optim.SGD(live.param_groups(0.2))
    for given in _images(0, 1):
        x, y = live.batch(*given)
        live.loss(x, y, None).backward()
        optimizer.step()
        live.step_end()
    assert all(torch.equal(p, b) for p, b in zip(live.model.parameters(), before, strict=True))
    assert live.installed[0].buffer.labels.bincount().tolist() == [6, 6]  # type: ignore[attr-defined]
    live.end_experience(_images(0, 1))
    once = [p.clone() for p in live.model.parameters()]
    with torch.no_grad():
        for p in live.model.parameters():
            p.add_(1.0)  # whatever the weights are when a task ends, training begins from the first
    live.end_experience(_images(0, 1))
    with torch.no_grad():
        right = [float((live.model(x).argmax(1) == y).float().mean()) for x, y in _images(0, 1)]
    assert min(right) == 1.0
    assert not all(torch.equal(p, o) for p, o in zip(live.model.parameters(), before, strict=True))
    assert all(
        (p - o).abs().max() < 0.5 for p, o in zip(live.model.parameters(), once, strict=True)
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(gv.BadInput, match="goes with er and er_ace"):
        gv.Replay(source="generator", method="derpp")
    with pytest.raises(gv.BadInput, match="nothing for 'herding' to choose by"):
        gv.Replay(method="gdumb", policy="herding")
    big = [(torch.rand(2, 3, 80, 80), torch.tensor([0, 1]))]
    with pytest.raises(gv.BadInput, match=r"not 19,200: set data\.img_size"):
        Generator(0).learn(big, 2, 1, 1.0, torch.device("cpu"))
