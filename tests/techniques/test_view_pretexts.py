"""BYOL, MoCo, VICReg and DINO: losses as the papers write them, targets that follow, and what a
checkpoint must hold of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.techniques._shared.momentum import MomentumTarget, momentum_at
from greenvis.techniques._shared.views import random_view, random_views
from greenvis.techniques.annotation.contrastive.byol import Byol, byol_loss
from greenvis.techniques.annotation.contrastive.dino import Dino, dino_loss
from greenvis.techniques.annotation.contrastive.moco import Moco, contrast, info_nce
from greenvis.techniques.annotation.contrastive.vicreg import (
    Vicreg,
    covariance,
    invariance,
    variance,
)

KINDS = (Byol(dim=8), Moco(dim=8, queue=10), Moco(dim=8, version="v3"), Vicreg(dim=8),
         Dino(dim=12, crops=2))  # fmt: skip


def _net() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def _images(count: int = 7) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x * y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(float((a * a).sum()) * float((b * b).sum()))


# -- losses ---------------------------------------------------------------------------------------


def test_byol_s_loss_is_the_squared_distance_of_unit_vectors() -> None:
    p, z = torch.randn(2, 5, 7)
    expected = sum(
        float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(p, z, strict=True)
    )
    assert byol_loss(p, z).item() == pytest.approx(expected / 5, abs=1e-5)
    assert byol_loss(p, 3 * p).item() == pytest.approx(0, abs=1e-5)


def test_moco_s_losses_are_equation_1_and_algorithm_1() -> None:
    q, k = torch.randn(2, 4, 6)
    queue, t = torch.randn(9, 6), 0.3
    total = 0.0
    for i in range(4):
        own = math.exp(_cosine(q[i], k[i]) / t)
        rest = sum(math.exp(_cosine(q[i], n) / t) for n in queue)
        total -= math.log(own / (own + rest))
    assert info_nce(q, k, queue, t).item() == pytest.approx(total / 4, abs=1e-5)
    total = 0.0
    for i in range(4):
        every = [math.exp(_cosine(q[i], n) / t) for n in k]
        total -= math.log(every[i] / sum(every))
    assert contrast(q, k, t).item() == pytest.approx(2 * t * total / 4, abs=1e-5)


def test_vicreg_s_terms_are_equations_1_to_4() -> None:
    a, b = 0.7 * torch.randn(2, 6, 3)
    n, d = a.shape
    means = [sum(float(a[i, j]) for i in range(n)) / n for j in range(d)]
    cov = [
        [
            sum((float(a[i, j]) - means[j]) * (float(a[i, k]) - means[k]) for i in range(n))
            / (n - 1)
            for k in range(d)
        ]
        for j in range(d)
    ]
    hinge = sum(max(0.0, 1 - math.sqrt(cov[j][j] + 1e-4)) for j in range(d)) / d
    shared = sum(cov[j][k] ** 2 for j in range(d) for k in range(d) if j != k) / d
    assert variance(a).item() == pytest.approx(hinge, abs=1e-5)
    assert covariance(a).item() == pytest.approx(shared, abs=1e-5)
    apart = sum(float((x - y) ** 2) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    assert invariance(a, b).item() == pytest.approx(apart / (n * d), abs=1e-5)
    assert torch.stack([variance(a[:1]), covariance(a[:1])]).isfinite().all()


def test_dino_s_loss_pairs_each_crop_with_the_target_s_others() -> None:
    student, teacher, centre = torch.randn(4, 3, 5), torch.randn(2, 3, 5), torch.randn(5)
    total, pairs = 0.0, 0
    for t in range(2):
        for s in range(4):
            if s == t:
                continue
            pairs += 1
            for i in range(3):
                p = ((teacher[t, i] - centre) / 0.05).double().exp()
                q = (student[s, i] / 0.1).double().exp()
                total -= float((p / p.sum() * (q / q.sum()).log()).sum()) / 3
    found = dino_loss(student, teacher, centre, 0.1, 0.05).item()
    assert found == pytest.approx(total / pairs, abs=1e-5)


# -- views and targets ----------------------------------------------------------------------------


def test_crops_have_the_size_and_the_share_asked_for() -> None:
    ramp = torch.arange(64.0).expand(200, 1, 64, 64)
    torch.manual_seed(0)
    seen = random_view(ramp, (0.05, 0.4), 0.0, flip=False, size=(32, 32))
    assert seen.shape == (200, 1, 32, 32)
    width = (seen.amax((1, 2, 3)) - seen.amin((1, 2, 3))) / 62
    assert width.max() < math.sqrt(0.4 * 4 / 3) + 0.02
    assert width.min() < 0.35
    torch.manual_seed(0)
    views = random_views(_images(), 3, 0.5, 0.2)
    torch.manual_seed(0)
    assert torch.equal(views[:7], random_view(_images(), 0.5, 0.2))
    assert views.shape == (21, 3, 16, 16)


def test_the_momentum_rises_to_one_by_a_cosine() -> None:
    assert momentum_at(0, 10, 0.9) == pytest.approx(0.9)
    assert momentum_at(10, 10, 0.9) == 1.0
    assert momentum_at(4, 10, 0.9) == pytest.approx(
        1 - 0.1 * (math.cos(math.pi * 0.4) + 1) / 2, abs=1e-9
    )
    assert momentum_at(4, None, 0.9) == 0.9


def test_the_target_is_a_copy_with_averaged_weights_and_its_own_statistics() -> None:
    model, copied = _net(), _net()
    target = MomentumTarget(model, model, 0.8)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    copied.train()
    x = _images()
    assert torch.allclose(target(x), copied(x), atol=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        for p, other in zip(model.parameters(), copied.parameters(), strict=True):
            p.add_(1.0)
            other.add_(0.2)
    target.follow(None)
    assert torch.allclose(target(x), copied(x), atol=1e-5)
    stored = target.state_dict()
    assert torch.allclose(stored["model.1.running_mean"], copied[1].running_mean, atol=1e-6)
    assert int(stored["model.1.num_batches_tracked"]) == 2
    again = MomentumTarget(model, model, 0.8)
    again.load_state_dict(stored)
    assert torch.equal(again(x), target(x))
    assert again.steps == 1


def test_the_oldest_keys_leave_the_queue() -> None:
    live = gv.wrap(_net(), Moco(dim=4, queue=10))
    moco: Any = live.installed[0]
    first = moco.queue.clone()
    shown = []
    moco.target = lambda views: shown.append(torch.randn(len(views), 4)) or shown[-1]
    for count in (7, 7):
        live.loss(_images(count), None, None)
    keys = nn.functional.normalize(torch.cat(shown), dim=1)
    assert torch.allclose(moco.queue[:4], keys[10:])
    assert torch.allclose(moco.queue[4:], keys[4:10])
    assert not torch.equal(moco.queue, first)
    assert int(moco.next) == 4


def test_the_words_wait_an_epoch_and_the_centre_follows_the_target() -> None:
    live = gv.wrap(_net(), Dino(dim=12, crops=2, centre_momentum=0.75))
    dino: Any = live.installed[0]
    words = dict(live.model.named_parameters())["5.dino.project.1.weight"]
    answers = []
    target = dino.target
    dino.target = lambda x: answers.append(target(x)) or answers[-1]
    dino.target.steps = 0
    live.loss(_images(), None, None).backward()
    assert not words.grad.any()
    assert torch.allclose(dino.centre, 0.25 * answers[0].mean(0), atol=1e-6)
    assert live.facts()["dino_small_crops"] == [[8, 8]]
    live.epoch_end()
    live.loss(_images(), None, None).backward()
    assert words.grad.any()


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", KINDS, ids=lambda r: f"{r.name}-{getattr(r, 'version', '')}")
def test_learns_and_leaves_a_plain_model(request_: Any) -> None:
    model = _net()
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    live = gv.wrap(model, request_)
    live.plan(40)
    optimizer = torch.optim.AdamW(live.param_groups(1e-2))
    losses = []
    for step in range(20):
        torch.manual_seed(0)
        loss = live.loss(_images(), None, None)
        loss.backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 10:
            live.epoch_end()
    assert all(p.isfinite().all() for p in model.parameters())
    if request_.name in ("byol", "vicreg"):  # the others' keys and words move
        assert losses[-1] < losses[0]
    assert list(live.merge().state_dict()) == keys
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert "0.weight" in changed
    assert not [n for n in changed if n.startswith("5.")]
    live.undo()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


RECIPE = """
name: pretexts
data: {name: digits, train: 120, test: 60, held_out: 40}
model: {ref: timm/resnet10t, in_chans: 1}
train: {epochs: 6, batch_size: 60, target: 0.12, threads: 1}
arms:
  moco: {techniques: [{moco: {queue: 64, dim: 16}}]}
"""


def test_a_pretext_stops_when_neighbours_of_images_held_out_say_so(tmp_path: Path) -> None:
    from greenvis.meters.record import find, read

    file = tmp_path / "pretexts.yaml"
    file.write_text(RECIPE)
    folder = gv.run(file, runs=tmp_path / "runs")
    record = read(next(iter(find([folder]))))
    assert record.status == "done"
    assert record.facts["epochs"] < 6
    assert any("held_out_accuracy" in entry for entry in record.logs)
    file.write_text(RECIPE.replace("held_out: 40", "held_out: 40, labels: 0"))
    with pytest.raises(BadInput, match=r"none are left to look for train\.target on"):
        gv.run(file, runs=tmp_path / "none")


def test_refuses_settings_that_change_nothing_or_cannot_be() -> None:
    with pytest.raises(BadInput, match="queue"):
        Moco(version="v3", queue=5)
    for kind, wrong in ((Byol, {"momentum": 1.5}), (Vicreg, {"dim": 1}), (Dino, {"crops": -1})):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            kind(**wrong)
    with pytest.raises(BadInput, match="shows no classifier"):
        gv.wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Byol())
