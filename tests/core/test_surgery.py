"""Snapshots give back everything; find, replace and freeze check first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import greenvis as gv
from greenvis.core.surgery import Snapshot, find, freeze, replace
from greenvis.errors import BadInput


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


class Net(nn.Module):
    """A small net whose two branches share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.shared = nn.Linear(4, 4)
        self.branches = nn.ModuleList([self.shared, self.shared])
        self.head = nn.Linear(4, 2)
        self.notes = ["as built"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(sum(branch(x) for branch in self.branches) + self.shared(x))


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()
        },
        "kinds": {n: type(m) for n, m in model.named_modules(remove_duplicate=False)},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    values = a.pop("values"), b.pop("values")
    return (
        a == b
        and values[0].keys() == values[1].keys()
        and all(torch.equal(v, values[1][k]) for k, v in values[0].items())
    )


def test_restore_gives_back_everything_bit_for_bit() -> None:
    model = Net().train()
    model.head.weight.requires_grad_(False)
    before = _state(model)
    snapshot = Snapshot(model)
    replace(model, model.shared, nn.Identity())
    freeze(model)
    snapshot.forget_unchanged()
    model.head = nn.Linear(4, 7)
    model.register_forward_hook(lambda *a: None)
    model.extra = nn.Linear(1, 1)
    model.notes.append("changed")
    model.eval()
    with torch.no_grad():
        model.stem[1].running_mean.add_(1)
    snapshot.restore()
    assert _same(before, _state(model))
    assert model.notes == ["as built"]
    assert model.branches[0] is model.branches[1] is model.shared


def test_restore_undoes_training_of_what_was_trainable() -> None:
    model = Net()
    before = _state(model)
    snapshot = Snapshot(model)
    snapshot.forget_unchanged()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    snapshot.restore()
    assert _same(before, _state(model))
    assert all(p.grad is None for p in model.parameters())


def test_forget_unchanged_keeps_no_copy_of_a_frozen_base() -> None:
    model = Net()
    snapshot = Snapshot(model)
    freeze(model)
    snapshot.forget_unchanged()
    buffers = len(list(model.buffers()))
    assert len(snapshot._values) == buffers


def test_replace_reaches_every_parent_that_shares() -> None:
    model = Net()
    new = nn.Linear(4, 4)
    assert replace(model, model.shared, new) == 3
    assert model.shared is model.branches[0] is model.branches[1] is new


def test_replace_refuses_what_is_not_there() -> None:
    model = Net()
    with pytest.raises(BadInput, match="not a sub-module"):
        replace(model, model, nn.Identity())


def test_find_matches_paths_and_tails() -> None:
    model = Net()
    assert find(model, ["head"]) == ["head"]
    assert find(model, ["stem.*"], nn.Conv2d) == ["stem.0"]
    with pytest.raises(
        BadInput, match=r"no Linear matches 'haed'; this model has 'shared', 'head'"
    ):
        find(model, ["haed"])
    with pytest.raises(BadInput, match="no Conv3d at all"):
        find(model, ["head"], nn.Conv3d)


def test_a_frozen_batch_norm_does_not_drift_even_after_train() -> None:
    model = Net()
    freeze(model, but=model.head.parameters())
    model.train()
    before = model.stem[1].running_mean.clone()
    model(torch.randn(8, 3, 8, 8) + 3)
    assert torch.equal(before, model.stem[1].running_mean)
    assert model.head.weight.requires_grad
    assert not model.shared.weight.requires_grad


@pytest.mark.parametrize("ends", ["merge", "undo"])
def test_statistics_that_were_moved_to_another_device_stay_there(ends: str) -> None:
    convs = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    live = gv.wrap(model, gv.Lora(targets=["conv"]))
    norm = model[1]
    for name, buffer in norm.named_buffers():  # what `Module.to` does to buffers
        norm._buffers[name] = buffer.clone().as_subclass(Elsewhere)
    moved = norm.running_mean
    moved.add_(1)
    live.merge() if ends == "merge" else live.undo()
    assert norm.running_mean is moved
    assert moved.eq(1 if ends == "merge" else 0).all()


def test_statistics_that_moved_still_count_as_changed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = Snapshot(model)
    for name, buffer in model[1].named_buffers():  # what `Module.to` does to buffers
        model[1]._buffers[name] = buffer.clone().as_subclass(Elsewhere)
    assert before.changed_buffers() == set()
    model[1].running_mean.add_(1)
    assert before.changed_buffers() == {id(model[1].running_mean)}
