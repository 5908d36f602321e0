"""AdaLoRA's ranks, and starts that look at data, equal PEFT's own; they resume, load and refuse as
everything else does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from peft import AdaLoraConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.peft._lora_ranks import orthogonality
from greenvis.techniques.iteration.peft.lora import Lora

X, Y = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.mid, self.head = nn.Linear(48, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.fc(x.flatten(1))))))


class _WithLoss(nn.Module):
    """What PEFT's AdaLoRA wants: an output that carries its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=F.cross_entropy(self.inner(x), y))


def _adalora(**more: Any) -> Lora:
    given = {
        "rank": 2,
        "start_rank": 4,
        "targets": ("fc", "mid"),
        "variant": "adalora",
        "head": "freeze",
        **more,
    }
    return Lora(**given, input_shape=(3, 4, 4))


def _train(
    live: Wrapped, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(live.param_groups(0.5))
    for _ in range(steps):
        x, y = live.batch(X, Y)
        logits = live.model(x)
        (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
    return optimizer


def test_adalora_equals_peft() -> None:
    torch.manual_seed(0)
    ours = _Two()
    theirs = _WithLoss(copy.deepcopy(ours))
    live = wrap(ours, _adalora(orthogonal=0.3))
    live.plan(20)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=4,
        total_step=20,
        tinit=2,
        tfinal=6,
        orth_reg_weight=0.3,
        target_modules=["fc", "mid"],
    )
    peft = get_peft_model(theirs, config)
    for n in ("fc", "mid"):
        a, b = getattr(ours, n), getattr(theirs.inner, n)
        for part in ("lora_A", "lora_B", "lora_E"):
            getattr(b, part)["default"].data.copy_(getattr(a, part)["default"])
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    for step in range(20):
        peft.base_model(X, Y).loss.backward()  # PeftModel itself passes AdaLoRA's penalty by
        optimizer.step()
        peft.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    term = live.installed[0].terms(X, Y, ours(X))["adalora"]
    factors = [
        f
        for n in ("fc", "mid")
        for f in (getattr(ours, n).lora_A["default"], getattr(ours, n).lora_B["default"].T)
    ]
    distances = [torch.linalg.norm(f @ f.T - torch.eye(len(f))).item() for f in factors]
    assert term.item() == pytest.approx(0.3 * sum(distances) / 4)  # their mean, however many layers
    _train(live, 20)
    for n in ("fc", "mid"):
        ours_e, theirs_e = (getattr(m, n).lora_E["default"] for m in (ours, theirs.inner))
        assert torch.allclose(ours_e, theirs_e, atol=1e-6)
    on = torch.cat([getattr(ours, n).lora_E["default"] for n in ("fc", "mid")]) != 0
    assert on.sum() == 4  # two of four ranks on average
    assert torch.allclose(ours(X), theirs.inner(X), atol=1e-5)
    before = ours(X)
    live.merge()
    assert type(ours.fc) is nn.Linear
    assert torch.allclose(ours(X), before, atol=1e-5)


def test_orthogonality_is_zero_for_orthonormal_factors() -> None:
    a = torch.eye(2, 5)
    assert orthogonality([("x.lora_A", a), ("x.lora_B", a.T)]) == 0
    assert orthogonality([("x.lora_A", 2 * a)]) == pytest.approx(
        3 * 2**0.5
    )  # ‖4·I − I‖ of two dimensions
    assert orthogonality([("x.lora_A", 2 * a), ("x.lora_B", a.T)]) == pytest.approx(1.5 * 2**0.5)


@pytest.mark.parametrize("at", [1, 3, 8])  # before the first ranks go, while they go, and after
def test_adalora_resumes(at: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = _Two()
    uninterrupted, first, second = (
        wrap(copy.deepcopy(base), _adalora(total_steps=9)) for _ in range(3)
    )
    for live in (first, second):
        live.load_state_dict(uninterrupted.state_dict())
    _train(uninterrupted, 10)
    _train(first, at)
    first.save(tmp_path)
    second.load(tmp_path)
    _train(second, 10 - at)
    assert torch.equal(second.model(X), uninterrupted.model(X))


def test_adalora_says_what_it_misses() -> None:
    live = wrap(_Two(), _adalora())
    with pytest.raises(BadInput, match="set total_steps, or call plan"):
        live.loss(X, Y, live.model(X))
    live.plan(4)
    (F.cross_entropy(live.model(X), Y) + live.loss(X, Y, live.model(X))).backward()
    live.model.zero_grad()
    with pytest.raises(GreenvisError, match="between optimizer"):
        live.step_end()


def test_lora_ga_equals_peft() -> None:
    torch.manual_seed(0)
    ours = _Two()
    theirs = copy.deepcopy(ours)
    base = {n: t.clone() for n, t in ours.state_dict().items()}
    config = LoraConfig(
        r=3,
        lora_alpha=3,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        target_modules=["fc", "mid"],
    )
    torch.manual_seed(0)
    preprocess_loraga(theirs, config, lambda: F.cross_entropy(theirs(X), Y).backward())
    peft = get_peft_model(theirs, config)
    before = ours.train()(X)
    request = Lora(
        rank=3,
        targets=("fc", "mid"),
        init="lora_ga",
        calibration=(X, Y),
        head="freeze",
        input_shape=(3, 4, 4),
    )
    live = wrap(ours, request)
    assert torch.allclose(ours(X), before, atol=1e-5)
    for n in ("fc", "mid"):
        a, b = getattr(ours, n), getattr(peft.base_model.model, n)
        assert torch.allclose(a.base_layer.weight, b.base_layer.weight, atol=1e-5)
        assert not torch.equal(a.base_layer.weight, base[f"{n}.weight"])
        assert torch.allclose(a.lora_A["default"].weight, b.lora_A["default"].weight, atol=1e-5)
    _train(live, 3)
    moved = ours(X)
    live.merge()
    assert torch.allclose(ours(X), moved, atol=1e-5)
    live.undo()
    assert all(torch.equal(t, base[n]) for n, t in ours.state_dict().items())


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"variant": "adalora", "init": "pissa"}, "leave out init"),
        ({"variant": "adalora", "rank": 4, "start_rank": 4}, "4 must be above 4"),
        ({"total_steps": 5}, "total_steps' is for variant: adalora"),
        ({"init": "lora_ga"}, r"calibration=\(images, labels\)"),
        ({"init": "lora_ga", "calibration": (X, Y[:2])}, r"calibration=\(images, labels\)"),
        ({"calibration": (X, Y)}, "calibration is for init: lora_ga"),
        ({"init": "lora_ga", "calibration": (X, Y), "rank": 9}, "whose smaller side is 16"),
    ],
)
def test_refusals_change_nothing(request_: dict[str, Any], says: str) -> None:
    model = _Two()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(BadInput, match=says):
        wrap(
            model,
            Lora(**{"targets": ("fc",), "head": "freeze", "input_shape": (3, 4, 4), **request_}),
        )
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "request_", "says"),
    [
        ("torchvision-vit", {"variant": "adalora"}, "there is no AdaLoRA"),
        (
            "timm-efficientnet-lite",
            {"variant": "adalora", "targets": ["conv_stem"]},
            "padding of its own",
        ),
        (
            "timm-resnet",
            {"init": "lora_ga", "targets": ["conv"], "calibration": (X, Y)},
            "not a Linear that runs itself",
        ),
    ],
)
def test_layers_it_does_not_know(name: str, request_: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        wrap(HOSTS[name].build(), Lora(rank=2, input_shape=HOSTS[name].input_shape, **request_))
