"""Who stays in the buffer, for any stream: classes alike, gradients apart, never a test image or
one of a task to come."""

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
from own_parts import Own, of_stream
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.data import streams
from greenvis.experiment import loop
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.iteration.continual._buffer import Buffer
from greenvis.techniques.iteration.continual._gradients import closeness, sample_gradients
from greenvis.techniques.iteration.continual._policies import (
    balanced_slot,
    gradient_slot,
    greedy_slot,
    largest,
)

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=300)


@settings(max_examples=60)
@given(
    labels=LABELS,
    size=st.integers(1, 40),
    seed=st.integers(0, 9),
    policy=st.sampled_from(["balanced", "ring"]),
)
def test_classes_stay_alike_whatever_the_stream(
    labels: list[int], size: int, seed: int, policy: str
) -> None:
    """Each class keeps all it had, or as many, less one, as any other: for every stream, imbalance
    and buffer."""
    buffer = Buffer(size, policy, seed)
    for part in torch.tensor(labels).split(7):
        buffer.offer(torch.rand(len(part), 2), part)
    kept, offered = Counter(buffer.labels.tolist()), Counter(labels)
    assert len(buffer) == min(size, len(labels))
    most = max(kept.values())
    assert all(kept[c] >= min(n, most - 1, size // len(offered)) for c, n in offered.items())


@settings(max_examples=60)
@given(labels=LABELS, size=st.integers(1, 40), seed=st.integers(0, 9), cut=st.integers(0, 300),
       policy=st.sampled_from(["reservoir", "balanced", "greedy", "ring"]))  # fmt: skip
def test_goes_on_exactly_from_anywhere(
    labels: list[int], size: int, seed: int, cut: int, policy: str
) -> None:
    x, y = torch.arange(len(labels) * 2.0).view(-1, 2), torch.tensor(labels)
    uninterrupted, first, second = (Buffer(size, policy, s) for s in (seed, seed, seed + 1))
    for buffer in (uninterrupted, first):
        buffer.offer(x[:cut], y[:cut])
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for buffer in (uninterrupted, second):
        buffer.offer(x[cut:], y[cut:])
    assert torch.equal(second.labels, uninterrupted.labels)
    assert second.draw(5) == uninterrupted.draw(5)
    assert second.facts() == uninterrupted.facts()
    if len(uninterrupted):
        rows = range(len(uninterrupted))
        assert torch.equal(second.take(rows)[0], uninterrupted.take(rows)[0])


STREAMS = {  # slots, and how often each class comes
    "3 classes in 10 slots": (10, [100] * 3),
    "10 classes in 501 slots": (501, [300] * 10),
    "a long tail in 100 slots": (100, [2000 // (rank + 1) for rank in range(20)]),
    "two classes of very unequal size in 7 slots": (7, [500, 100]),
}


def _kept(size: int, policy: str, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the labels that stay and when each came, from 0 to 1."""
    buffer = Buffer(size, policy, seed, exact=True)
    buffer.offer(torch.arange(len(labels))[:, None] / len(labels), labels)
    return buffer.labels, buffer.take(range(len(buffer)))[0][:, 0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_the_last_tenth_of_a_stream_is_a_tenth_of_the_buffer(policy: str, case: str) -> None:
    """Of each class what stays is as old as what came: also at sizes that the classes do not
    divide."""
    size, counts = STREAMS[case]
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ages = []
    for seed in range(max(3, 2000 // size)):
        shuffled = labels[
            torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        ]
        ages.append(_kept(size, policy, shuffled, seed)[1])
    age = torch.cat(ages)
    assert float((age >= 0.9).float().mean()) == pytest.approx(0.10, abs=0.03)
    assert float((age < 0.1).float().mean()) == pytest.approx(0.10, abs=0.03)


def test_a_class_once_largest_stays_full() -> None:
    """CBRS: with 4, 3 and 3 of 10 in place, one of the lesser two no longer pushes its way in each
    time it comes."""
    here = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert largest(here) == {0}
    assert (
        balanced_slot(here, 1, 9, {0}, 10, lambda below: 0) == 0
    )  # not full: in the place of the largest
    assert balanced_slot(here, 1, 9, {0, 1}, 10, lambda below: 2) == 6  # full: among its own
    assert balanced_slot(here, 1, 9, {0, 1}, 10, lambda below: below - 1) == -1  # or not at all


def test_greedy_keeps_who_came_first() -> None:
    assert greedy_slot([0, 0, 1], 1, {0, 1}, 4, lambda below: 0) == 3
    assert (
        greedy_slot([0, 0, 1], 0, {0, 1}, 4, lambda below: 0) == -1
    )  # has its share, though there is room
    assert greedy_slot([0, 0, 1, 1], 2, {0, 1}, 4, lambda below: 0) == 0  # new
    assert greedy_slot([0, 0, 0, 1], 1, {0, 1}, 4, lambda below: 0) == 0
    for size, counts in STREAMS.values():
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
        kept, age = _kept(size, "greedy", labels, 0)
        assert len(kept) <= size
        assert all(
            int((kept == c).sum()) >= min(size // len(counts), n) for c, n in enumerate(counts)
        )
        if (
            len(set(counts)) == 1
        ):  # all classes have come, and filled their share, long before the end
            assert float(age.max()) < 0.3


def test_greedy_makes_room_for_new_classes_and_lets_no_old_one_back() -> None:
    """Two classes, then two more, then the first two again, in ten slots: shares of 10, 5, 3 and 2,
    by what came first."""
    first, second = torch.tensor([0, 1] * 20), torch.tensor([2, 3] * 20)
    for seed in range(20):
        kept, age = _kept(10, "greedy", torch.cat([first, second, first]), seed)
        counts = Counter(kept.tolist())
        assert len(kept) == 10
        assert min(counts.values()) >= 2
        assert max(counts.values()) <= 4
        came = (age * 120).round().long()
        assert all(
            int(t) < 10 for t in came[kept < 2]
        )  # of the first five of each, none of the last forty
        assert all(40 <= int(t) < 46 for t in came[kept >= 2])  # of the first three of each


def test_gradient_selection_replaces_in_proportion() -> None:
    """Algorithm 2 of GSS: only what pulls another way enters; who goes is drawn by score, and may
    stay."""
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
        grads = torch.autograd.grad(
            F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters())
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    expected = F.cosine_similarity(rows[0][None], torch.stack(rows[2:]), dim=1).max()
    found = closeness(net, x[:2], y[:2], x[2:], y[2:])
    assert torch.allclose(found[0], 1 + expected, atol=1e-5)
    assert torch.equal(closeness(net, x, y, x[:0], y[:0]), torch.ones(5))
    ((_, each),) = sample_gradients(net, ["1.weight"], x, y)
    assert torch.allclose(each["1.weight"].flatten(1), torch.stack(rows)[:, :24], atol=1e-6)


def test_gradient_selection_works_in_a_loop_and_goes_on_exactly(tmp_path: Path) -> None:
    def steps(live: Any, batches: range) -> None:
        optimizer = torch.optim.SGD(live.param_groups(0.1))
        for i in batches:
            draw = torch.Generator().manual_seed(i)
            x, y = live.batch(
                torch.rand(4, 1, 2, 2, generator=draw), torch.randint(3, (4,), generator=draw)
            )
            F.cross_entropy(live.model(x), y).backward()
            optimizer.step()
            live.step_end()
            optimizer.zero_grad()

    torch.manual_seed(5)
    uninterrupted, first, second = (
        gv.wrap(_net(), gv.Replay(size=8, policy="gradient")) for _ in range(3)
    )
    steps(uninterrupted, range(8))
    steps(first, range(5))
    first.save(tmp_path)
    second.load(tmp_path)
    steps(second, range(5, 8))
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )
    scores = uninterrupted.installed[0].buffer.state_dict()["scores"]  # type: ignore[attr-defined]
    assert len(scores.unique()) > 4
    assert 0 <= scores.min() <= scores.max() <= 2


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["class", "task", "domain"])
@pytest.mark.parametrize("policy", ["reservoir", "ring", "balanced", "greedy", "herding"])
def test_never_a_test_image_nor_one_of_a_task_to_come(
    kind: Any, policy: Any, tmp_path: Path
) -> None:
    images = data.load(data.DataSpec(name="digits", train=120, test=60))
    its = streams.make(images, kind=kind, tasks=3)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(int(images.train.batch([0])[0].numel()), len(images.classes))
    )
    kept: list[Tensor] = []

    class Watched(gv.Replay):
        """Notes what the buffer holds after each experience."""

        def install(self, model: nn.Module) -> Any:
            live: Any = super().install(model)
            end = live.end_experience

            def look(loader: Any) -> None:
                end(loader)
                kept.append(live.buffer.take(range(len(live.buffer)))[0].flatten(1))

            live.end_experience = look
            return live

    spec = TrainSpec(epochs=1, batch_size=16, lr=0.01)
    with gv.track("choice", dir=tmp_path, codecarbon=False) as run:
        replay = Watched(size=30, policy=policy, exact=True)
        loop.run(Own(lambda: model, of_stream(its, spec, [replay])), run)
    shown = [part.batch(torch.arange(len(part)))[0].flatten(1) for part in its.train]
    tests = torch.cat([part.batch(torch.arange(len(part)))[0].flatten(1) for _, part in its.tests])
    assert len(kept) == 3
    for task, there in enumerate(kept):
        allowed = {tuple(row) for row in torch.cat(shown[: task + 1]).tolist()}
        assert len(there) >= 20
        assert {tuple(row) for row in there.tolist()} <= allowed
    assert not {tuple(row) for row in kept[-1].tolist()} & (
        {tuple(row) for row in tests.tolist()} - allowed
    )
