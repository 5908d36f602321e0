"""Who reads gradients reads them when the trainer has finished with them: unscaled, finite, of
steps that were taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience
from greenvis.errors import BadInput
from greenvis.techniques.iteration.continual._gradients import closeness
from greenvis.techniques.iteration.continual._importance import fisher, mas

STEPS, SKIPPED = 8, 3
X = torch.randn(STEPS, 5, 6, 1, 1, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (STEPS, 5), generator=torch.Generator().manual_seed(2))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


def _net() -> _Net:
    torch.manual_seed(0)
    return _Net()


def _adalora() -> gv.Lora:
    return gv.Lora(
        rank=1,
        start_rank=3,
        targets=("first", "last"),
        variant="adalora",
        head="freeze",
        total_steps=20,
        input_shape=(6, 1, 1),
    )


def _left(
    request: gv.Technique, scale: float | None = None, overflow: bool = False, how: str = ""
) -> dict[str, Tensor]:
    """Train with a gradient scaler and return what the technique holds. how: what else the loop
    does with gradients."""
    live = gv.wrap(_net(), request)
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step, (x, y) in enumerate(zip(X, Y, strict=True)):
        if (
            overflow and scale is None and step == SKIPPED
        ):  # what a skipped step is to be like: one that never was
            continue
        logits = live.model(x)
        loss = F.cross_entropy(logits, y) + live.loss(x, y, logits)
        scaler.scale(loss * (torch.inf if overflow and step == SKIPPED else 1.0)).backward()
        if how == "unscaled first":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if how == "cleared first":
            optimizer.zero_grad()
        live.step_end()
        optimizer.zero_grad()
    if isinstance(request, gv.Regularize):
        live.end_experience([(X[0], Y[0])])
    return {
        k: v
        for k, v in live.state_dict().items()
        if k.startswith((f"{request.name}.importance", f"{request.name}.ranks"))
    }


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("how", ["", "unscaled first", "cleared first"])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**16])
def test_importances_of_si_know_neither_the_scale_nor_a_skipped_step(
    scale: float, how: str, overflow: bool
) -> None:
    si = gv.Regularize(method="si", weight=1.0)
    expected, got = _left(si, overflow=overflow), _left(si, scale, overflow, how)
    assert sum(v.sum() for v in expected.values()) > 0.01
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(("how", "scale"), [("", 2.0**10), ("unscaled first", 2.0**16)])
def test_ranks_of_adalora_are_weighed_by_unscaled_gradients(how: str, scale: float) -> None:
    expected, got = _left(_adalora()), _left(_adalora(), scale, how=how)
    assert any("importance" in name for name in expected)
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-3, atol=1e-9), name


def test_a_skipped_step_leaves_no_trace_in_the_ranks_of_adalora() -> None:
    got = _left(_adalora(), 2.0**10, overflow=True)
    assert any("importance" in name for name in got)
    assert all(v.isfinite().all() for v in got.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sample", "batch", "weighted", "true", "mas"])
def test_importances_of_small_gradients_in_half_precision_are_not_lost(
    kind: Any, dtype: torch.dtype
) -> None:
    """Squares of gradients about 1e-4 are below what float16 can hold."""
    net = _net()
    with torch.no_grad():
        net.last.weight.mul_(1e-3)
        net.last.bias.mul_(1e-3)
    names = [n for n, _ in net.named_parameters()]
    half = copy.deepcopy(net).to(dtype)
    loader = list(zip(X, Y, strict=True))
    halves = [(x.to(dtype), y) for x, y in loader]
    ask = mas if kind == "mas" else fisher
    expected, got = (
        ask(n, names, data, *(() if kind == "mas" else (kind,)))
        for n, data in ((net, loader), (half, halves))
    )
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        assert got[name].sum() > 0
        assert torch.allclose(got[name].sum(), value.sum(), rtol=0.1), name


def test_gradients_are_compared_in_half_precision_without_overflow() -> None:
    net = _net()
    with torch.no_grad():
        net.last.weight.mul_(300)
    x, y = 300 * X[0], Y[0]
    expected = closeness(net, x, y, x.flip(0), y.flip(0))
    got = closeness(net.half(), x.half(), y, x.flip(0).half(), y.flip(0))
    assert torch.allclose(got, expected, atol=0.02)


def test_gates_of_hat_learn_in_half_precision() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2, num_classes=4
    )
    live = gv.wrap(model.half(), gv.Hat(s_max=400.0, anneal_steps=4))
    live.begin_experience(Experience(0, (0, 1, 2, 3), (0, 1, 2, 3)))
    images, labels = torch.randn(4, 1, 8, 8).half(), torch.arange(4)
    for _ in range(4):
        x, y = live.batch(images, labels)
        logits = model(x)
        (F.cross_entropy(logits.float(), y) + live.loss(x, y, logits)).backward()
        live.step_end()
    gates = [p for n, p in live.trainable.items() if n.endswith("embedding")]
    assert gates
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gates)


def test_lora_ga_refuses_gradients_that_are_not_finite() -> None:
    net = _net()
    x = X[0].clone()
    x[0, 0] = torch.inf
    with pytest.raises(BadInput, match="none that is finite"):
        gv.wrap(
            net,
            gv.Lora(
                rank=1,
                targets=("first",),
                init="lora_ga",
                calibration=(x, Y[0]),
                input_shape=(6, 1, 1),
            ),
        )
    assert all(p.grad is None for p in net.parameters())
