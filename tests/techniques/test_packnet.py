"""Tasks packed into one network: pruned by magnitude, frozen to the bit, and each answered by its
own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from experiences import batch, predict, task, train
from hosts import HOSTS
from torch import nn

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.continual.packnet import InstalledPackNet, PackNet, largest


def _of(live: Wrapped) -> InstalledPackNet:
    (installed,) = live.installed
    assert isinstance(installed, InstalledPackNet)
    return installed


def test_the_largest_free_weights() -> None:
    weight = torch.tensor([[0.1, -5.0, 3.0], [-0.2, 0.0, 4.0]])
    free = torch.tensor([[True, False, True], [True, True, True]])
    assert largest(weight, free, 0.4).tolist() == [[False, False, True], [False, False, True]]
    assert largest(weight, free, 0.01).tolist() == [[False, False, False], [False, False, True]]
    assert torch.equal(largest(weight, free, 1.0), free)
    assert not largest(weight, torch.zeros_like(free), 0.5).any()


def test_prunes_by_magnitude_layer_by_layer_and_rests_the_others_at_zero() -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, PackNet(keep=0.5, retrain_epochs=0))
    live.begin_experience(task(0))
    weight, before = model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight.detach().clone()  # type: ignore[index]
    live.end_experience([])
    kept = weight != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(weight[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    train(live, (3, 32, 32), range(1, 3))
    facts = live.facts()
    assert facts["packnet_shares"] == pytest.approx([0.5, 0.25, 0.125], abs=1e-3)
    assert facts["packnet_free"] == pytest.approx(0.125, abs=1e-3)
    assert torch.equal(weight[kept], before[kept])


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-resnet", "torchvision-vit", "transformers-swin", "plain"]
)
def test_a_task_is_answered_bit_for_bit_as_when_it_ended(name: str) -> None:
    host = HOSTS[name]
    x, _ = host.batch()
    live = wrap(host.build(), PackNet())
    train(live, host.input_shape, range(1))
    untold = predict(live, x)
    first = predict(live, x, 0)
    assert torch.equal(first, untold)
    train(live, host.input_shape, range(1, 2))
    second = predict(live, x, 1)
    train(live, host.input_shape, range(2, 3))
    now = predict(live, x)
    assert torch.equal(predict(live, x, 0), first)
    assert torch.equal(predict(live, x, 1), second)
    assert torch.equal(predict(live, x), now)
    assert (first - now).abs().max() > 1e-3


def test_retraining_lowers_the_loss_that_pruning_raised() -> None:
    x, y = batch((3, 32, 32), 0, 0)
    losses = {}
    for epochs in (0, 50):
        model = HOSTS["timm-vit"].build()
        live = wrap(model, PackNet(keep=0.1, retrain_epochs=epochs, retrain_lr=1e-2))
        live.begin_experience(task(0))
        live.end_experience([(x, y)])
        assert model.training
        losses[epochs] = F.cross_entropy(model.eval()(x)[:, :2], y).item()
        assert (model.blocks[0].attn.qkv.weight == 0).float().mean() == pytest.approx(0.9, abs=1e-3)  # type: ignore[index]
    assert losses[50] < 0.5 * losses[0]


def test_resumes_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    host, request = HOSTS["timm-resnet"], PackNet()
    uninterrupted, resumed = (wrap(host.build(), request) for _ in range(2))
    train(uninterrupted, host.input_shape, range(1), steps=3)
    train(uninterrupted, host.input_shape, range(1, 2), steps=2, end=False)
    uninterrupted.save(tmp_path)
    for index in range(2):
        resumed.begin_experience(task(index))
    resumed.load(tmp_path)
    for live in (uninterrupted, resumed):
        train(live, host.input_shape, range(1, 3), steps=3, begin=2)
    x, _ = host.batch()
    for index in (None, 0, 1, 2):
        assert torch.equal(predict(resumed, x, index), predict(uninterrupted, x, index))
    assert resumed.facts() == uninterrupted.facts()


def test_undo_is_exact_and_merge_keeps_all() -> None:
    host = HOSTS["timm-resnet"]
    model, (x, _) = host.build(), host.batch()
    before, keys = Snapshot(model), list(model.state_dict())
    live = wrap(model, PackNet())
    train(live, host.input_shape, range(2))
    live.eval_experience(task(0))
    with torch.no_grad():
        live.eval_experience(None)
        outputs = model(x)
        live.merge()
        assert torch.equal(model.eval()(x), outputs)
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_says_where_no_room_is_left() -> None:
    live = wrap(HOSTS["timm-vit"].build(), PackNet(keep=1.0, retrain_epochs=0))
    live.begin_experience(task(0))
    live.end_experience([])
    with pytest.raises(
        GreenvisError, match=r"no weight is left for task 2: give packnet a lower `keep` than 1.0"
    ):
        live.begin_experience(task(1))
    assert _of(live).done == 1


def test_refuses_nonsense() -> None:
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"retrain_epochs": -1}, {"prune": 0.5}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            PackNet(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has no layers but its classifier"):
        wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), PackNet(input_shape=(3, 4, 4)))
