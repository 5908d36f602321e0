"""Replay: who stays in the buffer, what comes back, each method's loss, and going on exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis.data.herding import herding
from greenvis.errors import GreenvisError
from greenvis.techniques.iteration.continual._buffer import Buffer, dequantise, quantise
from greenvis.techniques.iteration.continual._parts import er_ace_loss
from greenvis.techniques.iteration.continual._policies import reservoir_slots, ring_slot

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "reservoir.json").read_text())


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def _batch(seed: int = 0, n: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 2, 2), generator=g) / 255, torch.randint(4, (n,), generator=g)


def test_reservoir_decides_as_the_reference() -> None:
    its = FIXTURE["mammoth"]
    draws = np.random.RandomState(its["numpy_seed"])
    kept: dict[int, int] = {}
    items = np.arange(its["stream_length"])
    slots = reservoir_slots(
        items, its["buffer_size"], lambda bounds: np.array([draws.randint(0, b) for b in bounds])
    )
    assert slots == its["decisions"]
    for item, slot in enumerate(slots):
        if slot >= 0:
            kept[slot] = item
    assert [kept[i] for i in range(its["buffer_size"])] == its["final_buffer"]


def test_reservoir_is_uniform() -> None:
    """Chi-square over 2,000 streams: each of 30 items is kept equally often (not rejected at 1
    %)."""
    from scipy.stats import chi2

    counts = np.zeros(30)
    for seed in range(2000):
        buffer = Buffer(6, "reservoir", seed)
        buffer.offer(torch.arange(30.0)[:, None], torch.zeros(30, dtype=torch.int64))
        counts[buffer.take(range(6))[0].flatten().long().numpy()] += 1
    expected = 2000 * 6 / 30
    statistic = ((counts - expected) ** 2 / (expected * (1 - 6 / 30))).sum() * 29 / 30
    assert counts.sum() == 12_000
    assert statistic < chi2.ppf(0.99, 29)


@pytest.mark.parametrize(
    "shares", [(0.97, 0.01, 0.01, 0.01), (0.4, 0.3, 0.2, 0.1), (0.9, 0.1, 0.0, 0.0)]
)
def test_balanced_holds_for_any_imbalance(shares: tuple[float, ...]) -> None:
    draws = np.random.RandomState(3)
    labels = torch.tensor(draws.choice(4, 3000, p=shares))
    buffer = Buffer(20, "balanced", 0)
    for part in labels.split(10):
        buffer.offer(torch.rand(len(part), 2), part)
    kept, offered = Counter(buffer.labels.tolist()), Counter(labels.tolist())
    fair = 20 // len(offered)
    assert all(kept[c] >= min(fair, offered[c]) for c in offered)


def test_ring_keeps_each_classes_latest() -> None:
    buffer = Buffer(6, "ring", 0, exact=True)
    labels = torch.tensor([0] * 8 + [1] * 8 + [2] * 8)
    for i, label in enumerate(labels):
        buffer.offer(torch.tensor([[float(i)]]), label[None])
    x, y = buffer.take(range(6))
    assert {int(c): sorted(x[y == c].flatten().tolist()) for c in y.unique()} == {
        0: [6, 7],
        1: [14, 15],
        2: [22, 23],
    }
    assert ring_slot([0, 1], [0, 1], 2, 2) == 0


def test_herding_follows_the_running_mean() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(features.double(), dim=1)
    rows = herding(unit, 6).tolist()
    for k in range(6):
        errors = [
            (unit.mean(0) - unit[[*rows[:k], i]].mean(0)).norm() if i not in rows[:k] else torch.inf
            for i in range(30)
        ]
        assert rows[k] == int(np.argmin([float(e) for e in errors]))
    assert rows[:3] == herding(unit, 3).tolist()


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 7)])
def test_images_come_back_as_eight_bits_have_them(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).float()
    pixels.view(5, -1)[:, 0] = 0
    x = (pixels / 255 - 0.3) / 0.2
    levels, low, scale = quantise(x.numpy())
    assert levels.dtype == np.uint8
    span = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    assert ((dequantise(levels, low, scale) - x).abs().flatten(1).amax(1) <= span / 509).all()
    full = torch.arange(256.0).view(1, 1, 16, 16) / 255
    assert torch.allclose(dequantise(*quantise(full.numpy())), full, atol=1e-7)
    constant = torch.full((1, 1, 2, 2), 0.7)
    assert torch.equal(dequantise(*quantise(constant.numpy())), constant)


def _steps(live: Any, batches: range) -> list[Tensor]:
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    seen = []
    for i in batches:
        x, y = live.batch(*_batch(i))
        logits = live.model(x)
        loss = live.criterion(F.cross_entropy)(logits, y) + live.loss(x, y, logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        live.step_end()
        seen.append(x)
    return seen


@pytest.mark.parametrize("method", ["er", "er_ace", "der", "derpp"])
@pytest.mark.parametrize("policy", ["reservoir", "ring", "balanced"])
def test_saved_and_loaded_it_goes_on_exactly(method: Any, policy: Any, tmp_path: Path) -> None:
    request = gv.Replay(size=6, method=method, policy=policy, batch_size=3, every=2)
    uninterrupted = gv.wrap(_net(), request)
    seen = _steps(uninterrupted, range(9))
    first = gv.wrap(_net(), request)
    _steps(first, range(5))
    first.save(tmp_path)
    second = gv.wrap(_net(), request)
    second.load(tmp_path)
    again = _steps(second, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(again, seen[5:], strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )
    assert [len(x) > 4 for x in seen] == [False, True] * 4 + [False]


def test_only_what_was_shown_before_comes_back() -> None:
    live = gv.wrap(_net(), gv.Replay(size=50, batch_size=50, exact=True))
    shown: list[list[float]] = []
    for i, x in enumerate(_steps(live, range(6))):
        new, old = x[:4], x[4:]
        assert torch.equal(new, _batch(i)[0])
        assert all(image in shown for image in old.flatten(1).tolist())
        assert len(old) == len(shown)
        shown += new.flatten(1).tolist()
    facts = live.facts()
    assert facts["buffer_images"] == 24
    assert facts["buffer_bytes"] == 50 * (12 * 4 + 8)


@pytest.mark.parametrize("policy", ["reservoir", "ring", "balanced"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_waits_to_be_stored_is_as_it_was_offered(policy: str, exact: bool) -> None:
    """Storing in bulk, when it is asked for, gives what storing at once does; batches are written
    over meanwhile."""
    waits, at_once = (Buffer(7, policy, 3, exact) for _ in range(2))
    for step in range(300):
        x, y = _batch(step, 3)
        at_once.offer(x.clone(), y)
        assert "x" in at_once.columns  # asks for all
        waits.offer(x, y)
        x.fill_(torch.nan)
        if step % 4 == 1:
            rows = waits.draw(2)
            assert rows == at_once.draw(2)
            assert all(
                torch.equal(a, b) for a, b in zip(waits.take(rows), at_once.take(rows), strict=True)
            )
    assert {k: v.tolist() for k, v in waits.state_dict().items()} == {
        k: v.tolist() for k, v in at_once.state_dict().items()
    }


@pytest.mark.parametrize("policy", ["reservoir", "ring"])
def test_what_is_drawn_ahead_is_what_the_buffer_holds_when_it_is_given(policy: str) -> None:
    """Whatever comes between, whatever number is asked for; and one loaded from a state between two
    draws goes on alike."""
    buffer, twin = Buffer(40, policy, 0), Buffer(40, policy, 1)
    x, y = torch.rand(400, 3, 2, 2), torch.randint(3, (400,))
    seen: Counter[int] = Counter()
    for step in range(100):
        if step % 9 == 8:
            twin = Buffer(40, policy, 1)
            twin.load_state_dict(buffer.state_dict())
        new, count = slice(4 * step, 4 * step + 4), 3 if step % 7 == 6 else 5
        buffer.offer(x[new], y[new])
        rows, images, labels = buffer.sample(count)
        assert len(set(rows)) == min(count, len(buffer))
        assert torch.equal(images, buffer.take(rows)[0])
        assert torch.equal(labels, buffer.take(rows)[1])
        seen.update(rows)
        if step >= 8:
            twin.offer(x[new], y[new])
            again = twin.sample(count)
            assert again[0] == rows
            assert torch.equal(again[1], images)
            assert torch.equal(again[2], labels)
    assert len(buffer.sample(50)[0]) == 40
    assert all(seen[row] for row in range(40))


def test_a_buffer_of_bytes_is_a_quarter() -> None:
    exact, small = (Buffer(100, "reservoir", 0, exact) for exact in (True, False))
    for buffer in (exact, small):
        buffer.offer(torch.rand(10, 1, 28, 28), torch.zeros(10, dtype=torch.int64))
    assert small.nbytes < 0.27 * exact.nbytes


def _filled(method: Any, **more: Any) -> tuple[Any, Any]:
    live = gv.wrap(_net(), gv.Replay(size=8, method=method, batch_size=8, exact=True, **more))
    _steps(live, range(2))
    return live, live.installed[0]


def test_er_is_one_mean_over_new_and_replayed() -> None:
    live, _ = _filled("er")
    x, y = live.batch(*_batch(7))
    assert len(x) == 12
    assert live.criterion(F.cross_entropy) is F.cross_entropy
    assert live.loss(x, y, live.model(x)).item() == 0


def test_er_ace_lets_new_images_compete_among_their_own() -> None:
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 0, 3, 2])
    own = F.cross_entropy(logits[:3][:, :2], y[:3])
    assert torch.allclose(er_ace_loss(logits, y, 3), own + F.cross_entropy(logits[3:], y[3:]))
    assert torch.allclose(er_ace_loss(logits[:3], y[:3], 3), own)
    live, _ = _filled("er_ace")
    x, y = live.batch(*_batch(7))
    logits = live.model(x)
    assert torch.allclose(live.criterion(F.cross_entropy)(logits, y), er_ace_loss(logits, y, 4))


def test_dark_experience_matches_what_the_network_said_then() -> None:
    live, installed = _filled("derpp", alpha=0.3, beta=0.7)
    x, y = live.batch(*_batch(7))
    assert len(x) == 4 + 8 + 8
    logits = live.model(x)
    kept, rows = (
        installed.buffer.columns,
        [
            installed.buffer.columns["x"].flatten(1).tolist().index(i)
            for i in x[4:12].flatten(1).tolist()
        ],
    )
    assert torch.allclose(
        live.loss(x, y, logits), 0.3 * F.mse_loss(logits[4:12], kept["logits"][rows])
    )
    expected = F.cross_entropy(logits[:4], y[:4]) + 0.7 * F.cross_entropy(logits[12:], y[12:])
    assert torch.allclose(live.criterion(F.cross_entropy)(logits, y), expected)
    fresh = gv.wrap(_net(), gv.Replay(method="der"))
    x, y = fresh.batch(*_batch(0))
    then = fresh.model(x).detach()
    assert fresh.loss(x, y, fresh.model(x)).item() == 0
    fresh.step_end()
    assert torch.allclose(fresh.installed[0].buffer.columns["logits"][:4], then)  # type: ignore[attr-defined]


def test_dark_experience_without_the_extra_term_says_what_is_missing() -> None:
    live = gv.wrap(_net(), gv.Replay(method="der"))
    live.batch(*_batch())
    with pytest.raises(GreenvisError, match=r"add `live.loss\(x, y, logits\)` in each step"):
        live.step_end()


def test_herding_chooses_at_a_tasks_end_and_shares_among_classes() -> None:
    model = _net()
    live = gv.wrap(model, gv.Replay(size=8, policy="herding", batch_size=2))
    x, y = _batch(0, 40)
    low, high = y < 2, y >= 2
    _steps(live, range(2))
    buffer = live.installed[0].buffer  # type: ignore[attr-defined]
    assert len(buffer) == 0
    live.end_experience([(x[low], y[low])])
    assert Counter(buffer.labels.tolist()) == {0: 4, 1: 4}
    best = buffer.take([0, 1])[0]
    mine = x[y == buffer.labels[0]]
    with torch.no_grad():
        rows = herding(F.normalize(model[:3](mine).double(), dim=1), 2)
    assert torch.allclose(best, mine[rows], atol=2e-3)
    live.end_experience([(x[high], y[high])])
    assert Counter(buffer.labels.tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert torch.allclose(buffer.take([0, 1])[0], best, atol=4e-3)  # cut from behind
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_labels_of_another_kind_are_refused() -> None:
    live = gv.wrap(_net(), gv.Replay())
    with pytest.raises(GreenvisError, match="one class number per image"):
        live.batch(torch.rand(2, 3, 2, 2), torch.rand(2, 4))
    with pytest.raises(gv.BadInput, match="should be 'er'"):
        gv.Replay(method="deer")  # type: ignore[arg-type]
