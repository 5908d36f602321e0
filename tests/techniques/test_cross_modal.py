"""Dual encoders: losses as the papers write them, a locked tower whose features are kept, and any
image model beside a text model of transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greenvis as gv
from greenvis import models
from greenvis.core.example import Example
from greenvis.core.technique import Samples
from greenvis.errors import BadInput
from greenvis.meters.record import find, read
from greenvis.models.dual import TwoTowers, with_text
from greenvis.tasks.image_text import ImageText
from greenvis.techniques.annotation.cross_modal.cross_modal import (
    MOST,
    CrossModal,
    clip_loss,
    siglip_loss,
)

TOKENS = torch.tensor([[3, 4, 31], [5, 31, 0], [3, 4, 31], [8, 31, 0], [0, 0, 0]])
LABELS = torch.tensor([0, 1, 0, 2, -1])


def _images() -> Tensor:
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _vit() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5
    )


def _model(kind: str = "two", **more: Any) -> Any:
    torch.manual_seed(1)
    if kind == "clip":
        return models.build("plain/clip", img_size=32, embed_dim=32, tokens=32)
    return with_text(_vit(), 32, tokens=32, length=3, text_dim=32, text_depth=1, **more)


def _step(live: gv.Wrapped, optimizer: Any, at: Samples | None = None) -> float:
    task = ImageText()
    x, y = live.batch(Example((_images(), TOKENS)), LABELS)
    live.set_samples(at)
    live.model.train()
    outputs = task.answer(live.model, x, y)
    loss = live.criterion(task.loss)(outputs, y) + live.loss(x, y, outputs)
    loss.backward()
    optimizer.step()
    live.step_end()
    optimizer.zero_grad()
    return loss.item()


# -- losses ---------------------------------------------------------------------------------------


def test_clip_s_loss_is_figure_3() -> None:
    logits = 3 * torch.randn(4, 4)
    total = 0.0
    for i in range(4):
        across = sum(math.exp(float(logits[i, j])) for j in range(4))
        down = sum(math.exp(float(logits[j, i])) for j in range(4))
        total += 0.5 * (math.log(across) + math.log(down)) - float(logits[i, i])
    assert clip_loss(logits, torch.arange(4)).item() == pytest.approx(total / 4, abs=1e-5)
    assert clip_loss(logits, torch.full((4,), -1)).item() == 0


def test_siglip_s_loss_is_equation_1() -> None:
    logits = 3 * torch.randn(5, 5)
    total = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1 if LABELS[i] == LABELS[j] else -1
            total += math.log(1 + math.exp(-sign * float(logits[i, j])))
    assert siglip_loss(logits, LABELS).item() == pytest.approx(total / 4, abs=1e-5)
    assert siglip_loss(logits, torch.full((5,), -1)).item() == 0


def test_the_factor_of_clip_stays_at_100_and_siglip_begins_with_its_own() -> None:
    live = gv.wrap(_model(), CrossModal(), task="image_text")
    scale: Any = live.model.logit_scale
    with torch.no_grad():
        scale.fill_(9.0)
    _step(live, torch.optim.SGD(live.param_groups(1e-9), lr=1e-9))
    assert scale.item() == pytest.approx(math.log(100), abs=1e-6)
    assert pytest.approx(math.log(100)) == MOST
    before = _model()
    live = gv.wrap(_model(), CrossModal(loss="siglip"), task="image_text")
    named = dict(live.model.named_parameters())
    assert named["logit_scale"].item() == pytest.approx(math.log(10))
    assert named["cross_modal_bias"].item() == -10
    with torch.no_grad():
        out: Any = live.model.eval()(_images(), TOKENS)
        loss = live.criterion(ImageText().loss)(out, LABELS)
    assert loss.item() == pytest.approx(
        siglip_loss(out["logits_per_image"] - 10, LABELS).item(), abs=1e-5
    )
    undone = live.undo().state_dict()
    assert list(undone) == list(before.state_dict())
    assert all(torch.equal(t, undone[n]) for n, t in before.state_dict().items())


# -- towers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["bert", "distilbert", "clip_text_model"])
def test_any_text_model_of_transformers_stands_beside_an_image_model(text: str) -> None:
    model = _model(text=text).eval()
    assert isinstance(model, TwoTowers)
    with torch.no_grad():
        out = model(_images(), TOKENS)
        longer = model(_images(), nn.functional.pad(TOKENS, (0, 4)))
        one = model(_images()[1:2], TOKENS[1:2, :2])
    pairs = ImageText().outputs(out)
    assert pairs.logits.shape == (5, 5)
    assert torch.allclose(pairs.images.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.equal(out["text_embeds"], longer["text_embeds"])  # padding changes no text
    assert torch.allclose(one["text_embeds"], out["text_embeds"][1:2], atol=1e-5)
    assert torch.allclose(one["image_embeds"], out["image_embeds"][1:2], atol=1e-5)


@pytest.mark.parametrize("kind", ["two", "clip"])
def test_a_locked_tower_runs_once_for_each_image_and_learns_nothing(
    kind: str, tmp_path: Path
) -> None:
    states, losses = [], []
    for cache in (False, True):
        model = _model(kind)
        before = copy.deepcopy(model.state_dict())
        live = gv.wrap(model, CrossModal(image="frozen", cache=cache), task="image_text")
        tower = model.image if kind == "two" else model.model.vision_model
        ran: list[int] = []
        inner = tower.blocks[0] if kind == "two" else tower.encoder.layers[0]
        inner.register_forward_hook(lambda m, a, o, ran=ran: ran.append(1))
        at = Samples(tmp_path, {"images": kind}, 5, 1, torch.arange(5))
        optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
        torch.manual_seed(0)
        losses.append([_step(live, optimizer, at) for _ in range(3)])
        assert len(ran) == (1 if cache else 3)
        states.append(live.merge().state_dict())
        names = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
        frozen = {names[id(p)] for p in tower.parameters()}
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert not moved & frozen
        assert any("text" in name for name in moved)
        assert "forward" not in vars(tower)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert all(torch.allclose(t, states[1][n], atol=1e-6) for n, t in states[0].items())
    if kind == "two":
        assert list(states[0]) == list(_model().state_dict())


def test_a_locked_tower_goes_on_from_a_checkpoint() -> None:
    def new() -> gv.Wrapped:
        return gv.wrap(_model(), CrossModal(loss="siglip", image="frozen"), task="image_text")

    torch.manual_seed(0)
    steady = new()
    steady.model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)
    optimizer = torch.optim.SGD(steady.param_groups(0.1), lr=0.1)
    _step(steady, optimizer)
    second = new()
    second.model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)
    second.load_state_dict({k: v.clone() for k, v in steady.state_dict().items()})
    again = torch.optim.SGD(second.param_groups(0.1), lr=0.1)
    assert _step(second, again) == pytest.approx(_step(steady, optimizer), abs=1e-6)


def test_refuses_what_is_no_dual_encoder() -> None:
    with pytest.raises(BadInput, match="is no dual encoder"):
        gv.wrap(_vit(), CrossModal())
    with pytest.raises(BadInput, match="task: image_text"):
        gv.wrap(_vit(), CrossModal(), task="classification")
    with pytest.raises(BadInput, match="cache"):
        CrossModal(cache=True)
    with pytest.raises(BadInput, match="'bart3' makes no encoder of texts"):
        _model(text="bart3")
    with pytest.raises(BadInput, match="wants a backbone with one classifier"):
        with_text(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 32)


RECIPE = """
name: texts
task: image_text
data: {name: digits, train: 60, test: 40, captions: "the digit {name}"}
model: {ref: timm/resnet10t, in_chans: 1, head: text, text_dim: 32, text_depth: 1}
train: {epochs: 2, batch_size: 30, threads: 1}
arms:
  lit: {techniques: [{cross_modal: {image: frozen, cache: true}}]}
"""


def test_a_recipe_puts_texts_beside_any_image_model(tmp_path: Path) -> None:
    file = tmp_path / "texts.yaml"
    file.write_text(RECIPE)
    folder = gv.run(file, runs=tmp_path / "runs")
    path = next(iter(find([folder])))
    run = read(path)
    assert run.status == "done"
    assert run.facts["image_tower"]["hits"] == 60
    assert 0 <= run.facts["zero_shot"] <= 1
    again = models.build(f"file:{path.parent / 'model.safetensors'}")
    assert isinstance(again, TwoTowers)
