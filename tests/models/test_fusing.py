"""What can be folded is folded, with the same answers, and comes back."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.surgery import Snapshot
from greenvis.errors import BadInput, GreenvisError


def _built(name: str, **options: Any) -> nn.Module:
    model = timm.create_model(name, num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.7, 1.4)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.7, 1.3)
    return model


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8", "efficientvim_m1"]
)
def test_the_librarys_own_branches_fold(name: str) -> None:
    model = _built(name).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    layers = sum(1 for _ in model.modules())
    x = torch.rand(2, 3, 64, 64)
    fusion = gv.fuse(model, x)
    assert fusion.native
    assert fusion.difference < 1e-5
    assert sum(1 for _ in model.modules()) < layers
    assert not model.training
    fusion.undo()
    assert model.training
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_ours_and_batch_norms_fold() -> None:
    model = HOSTS["timm-resnet"].build()
    live = gv.wrap(model, gv.Reparam())
    with torch.no_grad():
        for parameter in live.declared.values():
            parameter.normal_(std=0.05)
    x = torch.rand(2, 3, 64, 64)
    expected = model.eval()(x)
    fusion = gv.fuse(model, x)
    assert fusion.convolutions
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    fusion.undo()
    torch.testing.assert_close(model.eval()(x), expected, atol=1e-5, rtol=1e-5)
    assert live.undo() is model


def test_nothing_to_fold_and_what_does_not_fold() -> None:
    with pytest.raises(BadInput, match="nothing to fold"):
        gv.fuse(HOSTS["timm-vit"].build())
    model = HOSTS["timm-vit"].build()
    live = gv.wrap(model, gv.Adapter(width=4))
    with pytest.raises(GreenvisError, match="cannot be merged"):
        gv.fuse(model)
    del live
    with pytest.raises(BadInput, match="what wrap"):
        gv.fuse(model)


def test_a_fold_that_answers_otherwise_is_taken_back() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0

        def fuse(self) -> nn.Module:
            return nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Wrong(), nn.Flatten(),
                          nn.Linear(4 * 36, 5))  # fmt: skip
    snapshot = Snapshot(model)
    wrong = model[2]
    with pytest.raises(BadInput, match="answers otherwise"):
        gv.fuse(model, torch.rand(2, 3, 8, 8))
    assert model[2] is wrong
    assert isinstance(model[1], nn.BatchNorm2d)
    assert all(snapshot.unchanged(i) for i in range(len(snapshot._tensors)))
