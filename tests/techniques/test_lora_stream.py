"""A change for each task: the sum the papers write, earlier ones frozen, orthogonal or apart, saved
and resumed in a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import Experience
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.techniques.iteration.continual.lora_stream import (
    InstalledLoraStream,
    LoraStream,
    orthogonality,
)
from greenvis.techniques.iteration.peft.adapter import Adapter


def _vit() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(3)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=6
    ).eval()  # fmt: skip


def _images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def _task(index: int) -> Experience:
    return Experience(index, (2 * index, 2 * index + 1), tuple(range(2 * index + 2)), 3, known=True)


def _train(live: Wrapped, tasks: range, steps: int = 3, begin: int = 0, end: bool = True) -> None:
    """Train on tasks; in the first of them, from step `begin` on."""
    for index in tasks:
        first = begin if index == tasks[0] else 0
        if not first:
            live.begin_experience(_task(index))
        optimizer = torch.optim.SGD(live.param_groups(0.1), weight_decay=0.1)
        for step in range(first, steps):
            x, y = _images(4 + step), torch.arange(4 + step) % 2
            live.model.train()
            logits = live.model(x)[
                :, 2 * index : 2 * index + 2
            ]  # the task's own classes, as a multi head
            loss = F.cross_entropy(logits, y) + live.loss(x, y, logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            live.step_end()
        if end:
            live.end_experience([])
    live.model.eval()


def _of(live: Wrapped) -> InstalledLoraStream:
    (installed,) = live.installed
    assert isinstance(installed, InstalledLoraStream)
    return installed


def test_orthogonality_is_the_papers_sum() -> None:
    a = torch.linalg.qr(torch.randn(6, 6))[0]
    assert orthogonality([a[:2], a[2:3]], a[3:5]) < 1e-10
    one, other = torch.randn(2, 6), torch.randn(3, 6)
    by_hand = sum((one[i] @ other[j]) ** 2 for i in range(2) for j in range(3))
    assert torch.allclose(orthogonality([one, one], other), 2 * by_hand, rtol=1e-5)


@pytest.mark.parametrize("mode", ["orthogonal", "arithmetic"])
def test_computes_the_base_and_the_sum_of_changes(mode: Any) -> None:
    model = _vit()
    scale = {"scale": 0.3} if mode == "arithmetic" else {}
    live = wrap(
        model, LoraStream(rank=2, alpha=3.0, targets=("blocks.0.mlp.fc1",), mode=mode, **scale)
    )
    _train(live, range(3))
    layer, x = model.blocks[0].mlp.fc1, torch.randn(5, 16)
    changes = [
        1.5 * layer.lora_B[f"task{i}"].weight @ layer.lora_A[f"task{i}"].weight for i in range(3)
    ]
    assert all(c.abs().max() > 1e-4 for c in changes)
    base = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    factor = 0.3 if mode == "arithmetic" else 1.0
    assert torch.allclose(layer(x), base + factor * x @ sum(changes).T, atol=1e-5)
    _of(live).use([1, 0, -0.5])  # negation
    assert torch.allclose(layer(x), base + x @ (changes[0] - 0.5 * changes[2]).T, atol=1e-5)
    live.eval_experience(_task(1))
    told = changes[1] if mode == "arithmetic" else changes[0] + changes[1]
    assert torch.allclose(layer(x), base + x @ told.T, atol=1e-5)
    live.eval_experience(None)
    assert _of(live).factors == [1, 0, -0.5]


@pytest.mark.parametrize("mode", ["orthogonal", "arithmetic"])
def test_a_task_that_is_told_is_not_forgotten_by_a_bit(mode: Any) -> None:
    model, x = _vit(), _images()
    live = wrap(model, LoraStream(rank=2, mode=mode))
    _train(live, range(1))
    frozen = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "task0" in n or not p.requires_grad
    }
    live.eval_experience(_task(0))
    before = model(x)
    live.eval_experience(None)
    _train(live, range(1, 3))
    assert all(torch.equal(model.get_parameter(n), value) for n, value in frozen.items())
    live.eval_experience(_task(0))
    assert torch.equal(model(x), before)
    live.eval_experience(None)
    assert not torch.equal(model(x), before)


def test_the_term_makes_the_next_task_orthogonal() -> None:
    def overlap(weight: float) -> float:
        model = _vit()
        torch.manual_seed(0)
        live = wrap(model, LoraStream(rank=2, targets=("qkv",), weight=weight))
        _train(live, range(1))
        assert live.terms(None, None, None) == {}
        _train(live, range(1, 2), steps=20)
        layer = model.blocks[0].attn.qkv
        return orthogonality([layer.lora_A["task0"].weight], layer.lora_A["task1"].weight).item()

    assert overlap(2.0) < 0.2 * overlap(0.0)


def test_trains_the_current_change_and_the_head_only() -> None:
    live = wrap(_vit(), [LoraStream(rank=2, targets=("mlp",)), Adapter(width=2)])
    live.begin_experience(_task(0))
    live.begin_experience(_task(1))
    assert {n.split("task")[1][0] for n in live.trainable if "lora" in n} == {"1"}
    assert {"head.weight", "head.bias"} <= set(live.trainable)
    learning = set(live.trainable)
    assert any("adapter" in n for n in learning)
    live.end_experience([])
    live.eval_experience(_task(0))
    live.eval_experience(None)
    assert set(live.trainable) == learning


@pytest.mark.parametrize("mode", ["orthogonal", "arithmetic"])
def test_resumes_in_the_middle_of_a_stream(tmp_path: Path, mode: Any) -> None:
    request = LoraStream(rank=2, mode=mode)
    torch.manual_seed(0)
    uninterrupted = wrap(_vit(), request)
    _train(uninterrupted, range(3))
    torch.manual_seed(0)
    first, second = wrap(_vit(), request), wrap(_vit(), request)
    torch.manual_seed(0)
    first = wrap(_vit(), request)
    _train(first, range(1))
    _train(first, range(1, 2), steps=2, end=False)
    state = torch.get_rng_state()
    first.save(tmp_path)
    for index in range(2):
        second.begin_experience(_task(index))
    torch.set_rng_state(state)
    second.load(tmp_path)
    _train(second, range(1, 3), begin=2)
    x = _images()
    assert torch.equal(second.model(x), uninterrupted.model(x))
    for live in (second, uninterrupted):
        live.eval_experience(_task(0))
    assert torch.equal(second.model(x), uninterrupted.model(x))
    assert second.facts() == uninterrupted.facts()
    assert uninterrupted.facts()["lora_stream_tasks"] == 3
    with pytest.raises(BadInput, match="does not fit"):
        wrap(_vit(), request).load(tmp_path)  # no task has begun there


def test_merges_to_plain_modules_and_undoes(tmp_path: Path) -> None:
    model, x = _vit(), _images()
    before, keys = Snapshot(model), list(model.state_dict())
    live = wrap(model, LoraStream(rank=2, mode="arithmetic", scale=0.5))
    _train(live, range(2))
    outputs = model(x)
    live.merge()
    assert list(model.state_dict()) == keys
    assert torch.allclose(model(x), outputs, atol=1e-5)
    live.undo()
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert all(p.requires_grad for p in model.parameters())


def test_refusals_name_the_layer() -> None:
    with pytest.raises(BadInput, match=r"no Linear or Conv2d matches 'linera'.*linear"):
        wrap(_vit(), LoraStream(targets=("linera",)))
    with pytest.raises(BadInput, match="'head' is the classifier, which trains in full"):
        wrap(_vit(), LoraStream(targets=("head",)))
    with pytest.raises(BadInput, match="weight is read by another module; the technique 'lora'"):
        wrap(HOSTS["torchvision-swin"].build(), LoraStream(targets=("qkv",)))
    with pytest.raises(BadInput, match="not a Linear or Conv2d; the technique 'lora'"):
        wrap(HOSTS["torchvision-vit"].build(), LoraStream(targets=("attention",)))
    with pytest.raises(BadInput, match="convolution in groups"):
        wrap(HOSTS["timm-convnext"].build(), LoraStream(targets=("conv_dw",)))
    live = wrap(_vit(), LoraStream())
    with pytest.raises(BadInput, match="2 factors were given, but there are changes of 1 tasks"):
        _of(live).use([1, 1])
    for wrong in ({"rank": 0}, {"mode": "ortho"}, {"scale": 0}, {"targets": ()}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            LoraStream(**wrong)  # type: ignore[arg-type]
