"""Who stays in the buffer, for any stream: classes alike, gradients apart, never a test image or one of a task to come."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import greenvis as gv
from greenvis import continual, data, stream
from greenvis.recipe import TrainSpec
from greenvis.techniques.iteration._buffer import Buffer
from greenvis.techniques.iteration._gradients import closeness, sample_gradients
from greenvis.techniques.iteration._policies import gradient_slot, greedy_slot
from greenvis.wrap import wrap

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, size=st.integers(1, 40), seed=st.integers(0, 9), policy=st.sampled_from(["balanced", "greedy", "ring"]))
def test_classes_stay_alike_whatever_the_stream(labels: list[int], size: int, seed: int, policy: str) -> None:
    """Each class keeps all it had, or as many, less one, as any other: for every stream, imbalance and buffer."""
    buffer = Buffer(size, policy, seed)
    for part in torch.tensor(labels).split(7):
        buffer.offer(torch.rand(len(part), 2), part)
    kept, offered = Counter(buffer.labels.tolist()), Counter(labels)
    assert len(buffer) == min(size, len(labels))
    most = max(kept.values())
    assert all(kept[c] >= min(n, most - 1, size // len(offered)) for c, n in offered.items())


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, size=st.integers(1, 40), seed=st.integers(0, 9), cut=st.integers(0, 300),
       policy=st.sampled_from(["reservoir", "balanced", "greedy", "ring"]))  # fmt: skip
def test_goes_on_exactly_from_anywhere(labels: list[int], size: int, seed: int, cut: int, policy: str) -> None:
    x, y = torch.arange(len(labels) * 2.0).view(-1, 2), torch.tensor(labels)
    whole, first, second = (Buffer(size, policy, s) for s in (seed, seed, seed + 1))
    for buffer in (whole, first):
        buffer.offer(x[:cut], y[:cut])
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for buffer in (whole, second):
        buffer.offer(x[cut:], y[cut:])
    assert torch.equal(second.labels, whole.labels)
    assert second.draw(5) == whole.draw(5)
    assert second.facts() == whole.facts()
    if len(whole):
        rows = range(len(whole))
        assert torch.equal(second.take(rows)[0], whole.take(rows)[0])


def test_greedy_keeps_who_came_first() -> None:
    assert greedy_slot([0, 0, 1], 1, 3, lambda below: 0) == 0
    assert greedy_slot([0, 1], 1, 2, lambda below: 0) == -1
    buffer = Buffer(4, "greedy", 0, exact=True)
    buffer.offer(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.int64))
    assert sorted(buffer.take(range(4))[0].flatten().tolist()) == [0, 1, 2, 3]
    buffer.offer(torch.arange(10.0, 20.0)[:, None], torch.ones(10, dtype=torch.int64))
    x, y = buffer.take(range(4))
    assert sorted(x[y == 1].flatten().tolist()) == [10, 11]


def test_gradient_selection_replaces_in_proportion() -> None:
    """Algorithm 2 of GSS: only what pulls another way enters; who goes is drawn by score, and may stay."""
    draw = random.Random(0)
    assert gradient_slot([1.0], 1.5, 2, draw) == 1  # room
    assert gradient_slot([1.0, 1.0], 1.0, 2, draw) == -1  # no other direction
    slots = Counter(gradient_slot([1.5, 0.5, 0.0], 0.5, 3, draw) for _ in range(20_000))
    assert slots[2] == 0
    assert slots[0] / 20_000 == pytest.approx(0.75 * 1.5 / 2.0, abs=0.015)
    assert slots[1] / 20_000 == pytest.approx(0.25 * 0.5 / 1.0, abs=0.015)


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_closeness_is_the_greatest_cosine_of_whole_gradients() -> None:
    net, x, y = _net(), torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    rows: list[Tensor] = []
    for i in range(5):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = F.cosine_similarity(rows[0][None], torch.stack(rows[2:]), dim=1).max()
    found = closeness(net, x[:2], y[:2], x[2:], y[2:])
    assert torch.allclose(found[0], 1 + wanted, atol=1e-5)
    assert torch.equal(closeness(net, x, y, x[:0], y[:0]), torch.ones(5))
    ((_, each),) = sample_gradients(net, ["1.weight"], x, y)
    assert torch.allclose(each["1.weight"].flatten(1), torch.stack(rows)[:, :24], atol=1e-6)


def test_gradient_selection_works_in_a_loop_and_goes_on_exactly(tmp_path: Path) -> None:
    def steps(live: Any, batches: range) -> None:
        optimizer = torch.optim.SGD(live.param_groups(0.1))
        for i in batches:
            draw = torch.Generator().manual_seed(i)
            x, y = live.batch(torch.rand(4, 1, 2, 2, generator=draw), torch.randint(3, (4,), generator=draw))
            F.cross_entropy(live.model(x), y).backward()
            optimizer.step()
            live.step_end()
            optimizer.zero_grad()

    torch.manual_seed(5)
    whole, first, second = (gv.wrap(_net(), gv.Replay(size=8, policy="gradient")) for _ in range(3))
    steps(whole, range(8))
    steps(first, range(5))
    first.save(tmp_path)
    second.load(tmp_path)
    steps(second, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True))
    scores = whole.installed[0].buffer.state_dict()["scores"]  # type: ignore[attr-defined]
    assert len(scores.unique()) > 4
    assert 0 <= scores.min() <= scores.max() <= 2


@pytest.mark.parametrize("kind", ["class", "task", "domain"])
@pytest.mark.parametrize("policy", ["reservoir", "ring", "balanced", "greedy", "herding"])
def test_never_a_test_image_nor_one_of_a_task_to_come(kind: Any, policy: Any, tmp_path: Path) -> None:
    images = data.load("digits", train=120, test=60)
    its = stream.make(images, kind=kind, tasks=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(images.train.batch([0])[0].numel()), len(images.classes)))
    live = wrap(model, gv.Replay(size=30, policy=policy, exact=True))
    buffer: Any = live.installed[0].buffer  # type: ignore[attr-defined]
    kept: list[Tensor] = []
    end = live.installed[0].end_task

    def look(loader: Any) -> None:
        end(loader)
        kept.append(buffer.take(range(len(buffer)))[0].flatten(1))

    live.installed[0].end_task = look  # type: ignore[method-assign]
    spec = TrainSpec(epochs=1, batch_size=16, lr=0.01)
    with gv.track("choice", dir=tmp_path, codecarbon=False) as run:
        continual.fit_stream(live, its, lambda t: data.batches(its.tests[t][1], 64), spec, run)
    shown = [part.batch(torch.arange(len(part)))[0].flatten(1) for part in its.train]
    tests = torch.cat([part.batch(torch.arange(len(part)))[0].flatten(1) for _, part in its.tests])
    assert len(kept) == 3
    for task, there in enumerate(kept):
        allowed = {tuple(row) for row in torch.cat(shown[: task + 1]).tolist()}
        assert len(there) >= 20
        assert {tuple(row) for row in there.tolist()} <= allowed
    assert not {tuple(row) for row in kept[-1].tolist()} & ({tuple(row) for row in tests.tolist()} - allowed)
