"""Tasks packed into one network: pruned by magnitude, frozen to the bit, and each answered by its
own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import Experience, logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.continual.packnet import InstalledPackNet, PackNet, largest


def _task(index: int) -> Experience:
    return Experience(index, (index, index + 1), tuple(range(index + 2)), 3, known=True)


def _batch(model_shape: tuple[int, int, int], index: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * index + step)
    return torch.rand(4, *model_shape, generator=generator), torch.arange(4) % 2 + index


def _train(
    live: Wrapped, shape: Any, tasks: range, steps: int = 2, begin: int = 0, end: bool = True
) -> None:
    for index in tasks:
        first = begin if index == tasks[0] else 0
        if not first:
            live.begin_experience(_task(index))
        optimizer = torch.optim.AdamW(live.param_groups(1e-2), weight_decay=0.1)
        for step in range(first, steps):
            x, y = _batch(shape, index, step)
            live.model.train()
            torch.manual_seed(step)
            F.cross_entropy(logits_of(live.model(x)), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            live.step_end()
        if end:
            live.end_experience([_batch(shape, index, step) for step in range(2)])
    live.model.eval()


def _outputs(live: Wrapped, x: Tensor, told: int | None = None) -> Tensor:
    live.eval_experience(None if told is None else _task(told))
    with torch.no_grad():
        out = logits_of(live.model.eval()(x))
    live.eval_experience(None)
    return out


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
    live.begin_experience(_task(0))
    weight, before = model.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight.detach().clone()  # type: ignore[index]
    live.end_experience([])
    kept = weight != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(weight[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()
    _train(live, (3, 32, 32), range(1, 3))
    facts = live.facts()
    assert facts["packnet_shares"] == pytest.approx([0.5, 0.25, 0.125], abs=1e-3)
    assert facts["packnet_free"] == pytest.approx(0.125, abs=1e-3)
    assert torch.equal(weight[kept], before[kept])


@pytest.mark.parametrize(
    "name", ["timm-vit", "timm-resnet", "torchvision-vit", "transformers-swin", "plain"]
)
def test_a_task_is_answered_bit_for_bit_as_when_it_ended(name: str) -> None:
    host = HOSTS[name]
    x, _ = host.batch()
    live = wrap(host.build(), PackNet())
    _train(live, host.input_shape, range(1))
    untold = _outputs(live, x)
    first = _outputs(live, x, 0)
    assert torch.equal(first, untold)
    _train(live, host.input_shape, range(1, 2))
    second = _outputs(live, x, 1)
    _train(live, host.input_shape, range(2, 3))
    now = _outputs(live, x)
    assert torch.equal(_outputs(live, x, 0), first)
    assert torch.equal(_outputs(live, x, 1), second)
    assert torch.equal(_outputs(live, x), now)
    assert (first - now).abs().max() > 1e-3


def test_retraining_lowers_the_loss_that_pruning_raised() -> None:
    x, y = _batch((3, 32, 32), 0, 0)
    losses = {}
    for epochs in (0, 50):
        model = HOSTS["timm-vit"].build()
        live = wrap(model, PackNet(keep=0.1, retrain_epochs=epochs, retrain_lr=1e-2))
        live.begin_experience(_task(0))
        live.end_experience([(x, y)])
        assert model.training
        losses[epochs] = F.cross_entropy(model.eval()(x)[:, :2], y).item()
        assert (model.blocks[0].attn.qkv.weight == 0).float().mean() == pytest.approx(0.9, abs=1e-3)  # type: ignore[index]
    assert losses[50] < 0.5 * losses[0]


def test_resumes_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    host, request = HOSTS["timm-resnet"], PackNet()
    uninterrupted, resumed = (wrap(host.build(), request) for _ in range(2))
    _train(uninterrupted, host.input_shape, range(1), steps=3)
    _train(uninterrupted, host.input_shape, range(1, 2), steps=2, end=False)
    uninterrupted.save(tmp_path)
    for index in range(2):
        resumed.begin_experience(_task(index))
    resumed.load(tmp_path)
    for live in (uninterrupted, resumed):
        _train(live, host.input_shape, range(1, 3), steps=3, begin=2)
    x, _ = host.batch()
    for index in (None, 0, 1, 2):
        assert torch.equal(_outputs(resumed, x, index), _outputs(uninterrupted, x, index))
    assert resumed.facts() == uninterrupted.facts()


def test_undo_is_exact_and_merge_keeps_all() -> None:
    host = HOSTS["timm-resnet"]
    model, (x, _) = host.build(), host.batch()
    before, keys = Snapshot(model), list(model.state_dict())
    live = wrap(model, PackNet())
    _train(live, host.input_shape, range(2))
    live.eval_experience(_task(0))
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
    live.begin_experience(_task(0))
    live.end_experience([])
    with pytest.raises(
        GreenvisError, match=r"no weight is left for task 2: give packnet a lower `keep` than 1.0"
    ):
        live.begin_experience(_task(1))
    assert _of(live).done == 1


def test_refuses_nonsense() -> None:
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"retrain_epochs": -1}, {"prune": 0.5}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            PackNet(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has no layers but its classifier"):
        wrap(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), PackNet(input_shape=(3, 4, 4)))
