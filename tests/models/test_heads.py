"""Heads in place of a classifier: a class per pixel, a class per bag; models of other tasks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from greenvis import models
from greenvis.core.example import Example
from greenvis.errors import BadInput
from greenvis.models.build import HEADS
from greenvis.models.detector import Pyramid
from greenvis.models.heads import Bags, Dense, with_head
from greenvis.tasks.detection import Detection
from greenvis.tasks.generation import Generation
from greenvis.tasks.image_text import ImageText
from greenvis.tasks.segmentation import Segmentation
from tests.hosts import HOSTS

DENSE = ["timm-vit", "timm-swin", "timm-resnet", "torchvision-vit", "transformers-convnext"]


def _build(name: str, head: str) -> tuple[Any, Tensor]:
    host = HOSTS[name]
    model = with_head(host.build(), head, 4, host.input_shape[1])
    return model, torch.rand(3, *host.input_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DENSE)
def test_every_pixel_has_a_class_and_every_parameter_a_gradient(name: str) -> None:
    model, x = _build(name, "dense")
    out = model.train()(x)
    assert out.shape == (3, 4, *x.shape[2:])
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    twin = copy.deepcopy(model.eval())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        assert not torch.equal(model(x), twin(x))  # its own features, not the first one's
        assert torch.equal(model(x), model(x))


def test_a_change_in_a_corner_changes_that_corner_most() -> None:
    torch.manual_seed(0)
    model, x = _build("timm-resnet", "dense")
    other = x.clone()
    other[:, :, :16, :16] = 0
    with torch.no_grad():
        change = (model.eval()(x) - model(other)).abs().sum(1)
    assert change[:, :16, :16].mean() > 2 * change[:, -16:, -16:].mean()


BOXES = {"timm-vit": (8,), "timm-swin": (4, 8), "timm-resnet": (4, 8, 16, 32)}


@pytest.mark.parametrize("name", BOXES)
def test_any_backbone_detects_on_the_maps_of_its_stages(name: str) -> None:
    model, x = _build(name, "boxes")
    pyramid = model.backbone
    assert isinstance(pyramid, Pyramid)
    assert [round(x.shape[-1] / m.shape[-1]) for m in pyramid(x).values()] == [*pyramid.strides]
    assert pyramid.strides == BOXES[name]
    box = {"boxes": torch.tensor([[2.0, 4.0, 18.0, 26.0]]), "labels": torch.tensor([3])}
    task = Detection()
    task.loss(task.answer(model.train(), x, [box] * 3), None).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    sent = {}
    pyramid.register_forward_pre_hook(lambda module, args: sent.update(x=args[0]))
    with torch.no_grad():
        assert len(task.answer(model.eval(), x)) == 3
    assert torch.equal(sent["x"], x)  # as they are: no size, no mean of the library's own


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "gated", "transmil"])
def test_bags_are_pooled_each_by_itself_whatever_is_packed_beside(pooling: str) -> None:
    torch.manual_seed(0)
    model, x = _build("timm-vit", pooling)
    assert isinstance(model.eval(), Bags)
    bag = torch.tensor([1, 0, 1])
    with torch.no_grad():
        both = model(x, bag)
        torch.testing.assert_close(both[0], model(x[[1]], torch.tensor([0]))[0])
        torch.testing.assert_close(both[1], model(x[[0, 2]], torch.tensor([0, 0]))[0])
        embedded = model.backbone(x)
        want = {"mean": embedded[[0, 2]].mean(0), "max": embedded[[0, 2]].amax(0)}
        if pooling in ("attention", "gated"):
            h = embedded[[0, 2]]
            v, w, gate = model.attend[0], model.attend[2], model.attend.gate
            hidden = (h @ v.weight.T + v.bias).tanh()
            if gate is not None:
                hidden = hidden * (h @ gate[0].weight.T + gate[0].bias).sigmoid()
            weights = (hidden @ w.weight.T + w.bias).softmax(0)
            want[pooling] = (weights * h).sum(0)
        if pooling != "transmil":
            torch.testing.assert_close(both[1], model.classify(want[pooling]))
        each = model(x)  # without bags each image is one, so that a model is looked at as any
        torch.testing.assert_close(each[1], both[0])


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "gated", "transmil"])
def test_images_are_scored_in_their_own_order(pooling: str) -> None:
    torch.manual_seed(0)
    model, x = _build("timm-vit", pooling)
    bag = torch.tensor([1, 0, 1])
    with torch.no_grad():
        scores = model.eval().instance_scores(x, bag)
        apart = model.instance_scores(x[[1]], torch.tensor([0]))
        two = model.instance_scores(x[[0, 2]], torch.tensor([0, 0]))
    torch.testing.assert_close(scores, torch.stack([two[0], apart[0], two[1]]))


@pytest.mark.parametrize("pooling", ["attention", "gated"])
def test_packed_bags_keep_at_most_0_6_of_what_padded_ones_do(pooling: str) -> None:
    """Bytes kept for the backward: bags of 2 to 50 images as they are, and all filled up to 50."""
    model, _ = _build("timm-vit", pooling)
    sizes = torch.linspace(2, 50, 13).long()

    def kept(sizes: torch.Tensor) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.rand(int(sizes.sum()), 3, 32, 32)
        bag = torch.arange(len(sizes)).repeat_interleave(sizes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model.train()(x, bag)
        assert logits.shape[0] == len(sizes)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for at, size in storages.items() if at not in weights)

    assert kept(sizes) <= 0.6 * kept(torch.full_like(sizes, 50))


def test_a_head_is_asked_for_by_reference_and_saved_with_the_model(tmp_path: Path) -> None:
    options = {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "num_classes": 5,
    }  # fmt: skip
    ref = "timm/vit_tiny_patch16_224"
    for head in [name for name in HEADS if name not in ("text", "images")]:
        model = models.build(ref, head=head, **options)
        assert isinstance(model, {"dense": Dense, "boxes": FCOS}.get(head, Bags))
        models.save(model, tmp_path / "m.safetensors", ref=ref, options={**options, "head": head})
        again = models.build(f"file:{tmp_path / 'm.safetensors'}")
        x = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), again.eval()(x), rtol=0, atol=0)
    with pytest.raises(BadInput, match=r"unknown head 'dens'.*dense"):
        models.check(ref, head="dens")
    with pytest.raises(BadInput, match="one classifier"):
        _build("timm-deit-distilled", "mean")
    for head in ("dense", "boxes"):
        with pytest.raises(BadInput, match=f"`head: {head}` wants .*work on parts"):
            _build("timm-mobilevit", head)


def test_torchvisions_segmenters_and_detectors_are_built_without_the_net() -> None:
    model = models.build("torchvision/lraspp_mobilenet_v3_large", num_classes=3, in_chans=3)
    x = torch.rand(2, 3, 64, 64)
    task = Segmentation()
    task.check(task.answer(model.train(), x), torch.zeros(2, 64, 64).long(), 3)
    options = {"num_classes": 3, "in_chans": 3, "min_size": 64, "max_size": 64}
    detector = models.build("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", **options)
    with torch.no_grad():
        assert len(Detection().answer(detector.eval(), x)) == 2
    with pytest.raises(BadInput, match="3 channels"):
        models.build("torchvision/ssdlite320_mobilenet_v3_large", in_chans=1)


def test_a_small_clip_answers_images_and_texts() -> None:
    model = models.build("plain/clip", img_size=16, patch_size=8, embed_dim=16, tokens=32)
    tokens = torch.tensor([[30, 5, 6, 31, 0], [30, 7, 31, 0, 0], [30, 5, 31, 0, 0]])
    batch = Example((torch.rand(3, 3, 16, 16), tokens))
    task = ImageText()
    pairs = task.answer(model.eval(), batch, None)
    task.check(pairs, torch.tensor([0, 1, 2]))
    longer = Example((batch.args[0], torch.cat([tokens, tokens * 0], 1)))
    torch.testing.assert_close(task.answer(model, longer).texts, pairs.texts)  # padding is none


def test_the_autoencoder_learns_to_draw_its_classes() -> None:
    torch.manual_seed(0)
    model = models.build("plain/vae", num_classes=2, in_chans=1, img_size=4)
    y = torch.arange(64) % 2
    x = (2.0 * y - 1).view(-1, 1, 1, 1) + 0.1 * torch.randn(64, 1, 4, 4)
    task, optimizer = Generation(), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = task.loss(task.answer(model.train(), x, y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = task.answer(model.eval(), x, y)
    task.check(drawn, y)
    assert drawn.images[y == 1].mean() > 0.5 > -0.5 > drawn.images[y == 0].mean()
