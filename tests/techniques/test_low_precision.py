"""Low precision: what is served in bfloat16 is the model, rounded; afterwards it is itself again."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.tasks.answers import main_output
from greenvis.techniques.inference.exits.early_exit import EarlyExit
from greenvis.techniques.inference.precision._int8 import in_int8, rounded
from greenvis.techniques.inference.precision.low_precision import LowPrecision
from greenvis.techniques.inference.tokens.token_merge import TokenMerge


@pytest.mark.one_in(4)
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


# the mobilenet's random answers are as small as rounding is
@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", sorted({*HOSTS} - {"torchvision-mobilenet"}))
def test_a_model_in_int8(name: str) -> None:
    host = HOSTS[name]
    model = host.build().eval()
    x, _ = host.batch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    live = gv.wrap(model, LowPrecision(precisions=["int8"]))
    points = live.operating_points()
    assert list(points) == ["fp32", "int8"]
    with points["fp32"], torch.inference_mode():
        exact = main_output(model(x)).clone()
    with points["int8"], torch.inference_mode():
        rounded = main_output(model(x)).clone()
    with torch.inference_mode():
        assert torch.equal(main_output(model(x)), exact)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.25 * exact.abs().max()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    facts = live.facts()["low_precision"]
    assert 0 < facts["int8_weights"] <= facts["parameters"]


def test_what_int8_multiplies() -> None:
    """y = s_x s_w (q_x - z) q_w, of a Linear and of a pointwise convolution, which is one."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 6)
    weight = layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    steps = (weight / scale).round()
    torch.testing.assert_close(rounded(weight).int_repr().float(), steps, atol=1, rtol=0)
    x = torch.randn(5, 16)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    with in_int8(layer), torch.no_grad():
        got = layer(x)
        assert layer(torch.empty(0, 16)).shape == (0, 6)
    errors = []
    for bits in (7, 8):  # as the processor has it
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round()
        whole = ((x / step).round() + zero).clamp(0, 2**bits - 1)
        expected = (whole - zero) * step @ (steps * scale).T + layer.bias
        errors.append((got - expected).abs().max().item())
    assert min(errors) < 2e-3 * float(got.abs().max().detach())
    conv = nn.Conv2d(16, 6, 1)
    conv.load_state_dict({"weight": weight[:, :, None, None], "bias": layer.bias.detach()})
    with in_int8(conv), torch.no_grad():
        maps = conv(x.T.reshape(1, 16, 5, 1))
    torch.testing.assert_close(maps, got.T.reshape(1, 6, 5, 1))
    spatial = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(BadInput, match="no Linear or pointwise"):
        gv.wrap(spatial, LowPrecision(precisions=["int8"], input_shape=(3, 8, 8)))


def test_int8_beside_merged_tokens_and_exits() -> None:
    host = HOSTS["timm-vit"]
    model = host.build()
    x, _ = host.batch()
    chosen = [LowPrecision(precisions=["int8"]), TokenMerge(r=2), EarlyExit()]
    live = gv.wrap(model, chosen)
    points = live.operating_points()
    assert {"fp32", "int8"} < set(points)
    model.eval()
    with points["int8"], torch.inference_mode():
        assert main_output(model(x)).isfinite().all()
    assert live.undo() is model


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
