"""Low precision: what is served in bfloat16 is the model, rounded; afterwards it is itself again."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.tasks.answers import main_output
from greenvis.techniques.inference.precision.low_precision import LowPrecision


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_a_model_is_rounded_for_a_while(name: str) -> None:
    host = HOSTS[name]
    model = host.build().eval()
    x, _ = host.batch()
    with torch.no_grad():
        before = main_output(model(x))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    live = gv.wrap(model, LowPrecision())
    points = live.operating_points()
    assert list(points) == ["fp32", "bf16"]
    seen: list[torch.dtype] = []
    layer = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    hook = layer.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with points["bf16"], torch.inference_mode():
        rounded = main_output(model(x))
    with points["fp32"], torch.inference_mode():
        same = main_output(model(x))
    hook.remove()
    assert seen[0] is torch.bfloat16
    assert seen[-1] is torch.float32
    assert rounded.dtype is torch.float32
    assert torch.equal(same, before)
    assert not torch.equal(rounded, before)
    # bfloat16 holds 8 bits of the mantissa
    assert (rounded - before).abs().max() < 0.1 * before.abs().max()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert live.undo() is model


def test_weights_come_back_after_an_error() -> None:
    model = HOSTS["timm-vit"].build().eval()
    weight = model.head.weight  # type: ignore[union-attr]
    live = gv.wrap(model, LowPrecision())
    with pytest.raises(RuntimeError), live.operating_points()["bf16"]:
        model(torch.rand(2, 5, 32, 32))
    assert weight.dtype is torch.float32
    assert not model._forward_hooks


class _Wide(nn.Module):
    """Adds float64 numbers up, as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(5), self.head(x.flatten(1)).T).T


def test_refusals() -> None:
    with pytest.raises(BadInput, match="does not run in bfloat16"):
        gv.wrap(_Wide(), LowPrecision(input_shape=(3, 2, 2)))
    half = HOSTS["timm-vit"].build().bfloat16()
    with pytest.raises(BadInput, match="for a model in float32"):
        gv.wrap(half, LowPrecision())
