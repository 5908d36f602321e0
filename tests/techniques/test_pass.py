"""PASS equals the authors' fixture, aligns the same places of two views, and makes label maps of
clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

from greenvis import models
from greenvis.core.technique import Samples
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.models.heads import with_head
from greenvis.techniques._shared.views import random_maps, random_view, through
from greenvis.techniques.annotation.dense import _pass as maths
from greenvis.techniques.annotation.dense.label_maps import LabelMaps
from greenvis.techniques.annotation.dense.pass_pretrain import PassPretrain
from greenvis.techniques.annotation.dense.pixel_attention import PixelAttention

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pass_luss.pt"


def _dense(classes: int = 4) -> Any:
    torch.manual_seed(0)
    net = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 16), output_stride=8)
    return with_head(net, "dense", classes, 32)


def _scenes(count: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Noise, with a bright square of one of two colours on it, and masks."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(count, 3, side, side, generator=generator)
    y = torch.zeros(count, side, side, dtype=torch.int64)
    for i in range(count):
        top, left = torch.randint(0, side // 2, (2,), generator=generator).tolist()
        x[i, i % 2, top : top + side // 2, left : left + side // 2] += 2
        y[i, top : top + side // 2, left : left + side // 2] = 1 + i % 2
    return x, y


def test_assignment_and_pixel_loss_equal_the_fixture() -> None:
    known = torch.load(FIXTURE, weights_only=False)
    one = known["sinkhorn"]
    found = maths.sinkhorn(one["scores"], one["epsilon"], one["iterations"])
    assert torch.allclose(found, one["Q"], atol=1e-5)
    use = [(q.sum(0) - 12 / 7).abs().max() for q in (found, (one["scores"] / 0.05).softmax(1))]
    assert use[0] < 0.5 * use[1]  # all are used more alike
    two = known["p2p"]
    predicted, embedding = (two[n].unflatten(0, (2, 2)) for n in ("output", "embedding"))
    assert torch.allclose(maths.pixel_loss(predicted, embedding), two["loss"], atol=1e-5)
    turned = maths.pixel_loss(predicted.flip(0), embedding)
    assert abs(turned - two["loss"]) > 1e-3


def test_grids_are_the_composition_of_both_crops() -> None:
    """Independently: a place of one view is sent to the image by its map, a 3 × 3 matrix, and on by
    the inverse of the other's; and what the views show there is the same."""
    torch.manual_seed(0)
    count = 60
    one, two = (random_maps(count, (0.1, 0.6), True, torch.device("cpu")) for _ in range(2))
    grids = maths.overlap_grids(one, two, 5)
    assert grids.shape == (2, count, 5, 5, 2)
    shared = grids.amin((0, 2, 3, 4)) > -2
    assert 0 < shared.sum() < count  # some views share nothing
    bottom = torch.tensor([0.0, 0, 1]).expand(count, 1, 3)
    a, b = (torch.cat([m, bottom], 1).double() for m in (one, two))
    places = torch.cat([grids[0], torch.ones(count, 5, 5, 1)], -1).double()
    moved = torch.einsum("nij,nhwj->nhwi", torch.linalg.inv(b) @ a, places)[..., :2]
    assert torch.allclose(moved[shared].float(), grids[1][shared], atol=1e-4)
    assert grids[:, shared].abs().max() <= 1
    ramp = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 33)] * 2, indexing="ij"))
    images = ramp.expand(count, -1, -1, -1)
    seen = [
        maths.at_places(through(images, m, (65, 65)), g)
        for m, g in zip((one, two), grids, strict=True)
    ]
    inside = (grids.abs().amax((0, 4)) < 0.96)[:, None].expand_as(seen[0])
    assert inside.float().mean() > 0.4
    assert (seen[0] - seen[1])[inside].abs().max() < 0.05
    assert seen[0][inside].std() > 0.2
    assert maths.at_places(images[:1], torch.full((1, 2, 2, 2), maths.NOWHERE)).abs().max() == 0


def test_a_view_is_what_it_was() -> None:
    """Drawing the map, reading through it and recolouring are one after another what
    `random_view` is."""
    x = torch.rand(3, 2, 8, 8)
    torch.manual_seed(5)
    maps = random_maps(3, 0.3, True, x.device)
    out = through(x, maps)
    contrast, brightness = (torch.rand(3).view(-1, 1, 1, 1) * 0.8 - 0.4 for _ in range(2))
    mean, deviation = out.mean((1, 2, 3), keepdim=True), out.std((1, 2, 3), keepdim=True)
    torch.manual_seed(5)
    view = random_view(x, 0.3, 0.4)
    want = (out - mean) * (1 + contrast) + mean + brightness * deviation
    assert torch.allclose(view, want, atol=1e-6)


def test_a_threshold_parts_two_heaps() -> None:
    low, high = torch.randn(300) * 0.02 + 0.2, torch.randn(100) * 0.02 + 0.7
    values = torch.cat([low, high])
    assert low.max() < maths.otsu(values) < high.min()
    grid = torch.linspace(0.1, 0.9, 161)
    within = [
        sum(float(p.var(correction=0)) * len(p) for p in (values[values < t], values[values >= t]))
        for t in grid.tolist()
        if (values < t).any() and (values >= t).any()
    ]
    at = maths.otsu(values)
    own = sum(
        float(p.var(correction=0)) * len(p) for p in (values[values < at], values[values >= at])
    )
    assert own <= min(within) * 1.001
    assert maths.otsu(torch.full((5,), 0.3)) == pytest.approx(0.3)


def test_prototypes_of_the_last_block_get_no_gradient_from_the_earlier_one() -> None:
    live = wrap(_dense(), PassPretrain(prototypes=6, dim=8, frozen_epochs=0))
    x, _ = _scenes(6)
    torch.manual_seed(0)
    terms = live.terms(x, None, None)
    prototypes: Any = live.installed[0]
    weight = prototypes.parts.prototypes.weight
    terms["pass_shallow"].backward(retain_graph=True)
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0
    terms["pass_images"].backward()
    assert weight.grad.abs().max() > 0


def test_the_queue_is_balanced_with_the_batch_and_kept() -> None:
    """From its epoch on; and a checkpoint brings it back."""
    request = PassPretrain(prototypes=6, dim=8, queue=16, queue_epoch=1, pixels=0, shallow=0)
    x, _ = _scenes(6)
    live = wrap(_dense(), request)
    added: Any = live.installed[0]
    sizes: list[int] = []
    own = maths.sinkhorn
    import greenvis.techniques.annotation.dense._swav as swav

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swav, "sinkhorn", lambda s, *a: sizes.append(len(s)) or own(s, *a))
        for _ in range(4):
            live.loss(x, None, None)
            live.epoch_end()
    assert sizes == [6, 6, 12, 12, 18, 18, 22, 22]
    assert int(added._state["queued"]) == 16
    again = wrap(_dense(), request)
    again.load_state_dict(live.state_dict())
    state: Any = again.installed[0]
    assert torch.equal(state._state["queue"], added._state["queue"])


def _pretrained() -> Any:
    """A model that was pretrained for a few steps, with its attention beside it."""
    model, (x, _) = _dense(), _scenes(16)
    for request, steps in (
        (PassPretrain(prototypes=6, dim=8, frozen_epochs=0), 15),
        (PixelAttention(prototypes=6, dim=8, frozen_epochs=0), 15),
    ):
        torch.manual_seed(0)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        live = wrap(model, request)
        optimizer = torch.optim.AdamW(live.param_groups(3e-3))
        losses = []
        for _ in range(steps):
            torch.manual_seed(1)
            model.train()
            loss = live.loss(x, None, None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model = live.merge().eval()
        assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    return model


def test_three_stages_make_label_maps_without_a_mask(tmp_path: Path) -> None:
    base, (x, y) = _pretrained(), _scenes(16)
    state = models.attached(base, maths.ATTACHED)
    assert state is not None
    model = _dense()
    live = wrap(model, LabelMaps(base=base, clusters=2, images=16, repeats=2), task="segmentation")
    live.feed(train=[(x, y)])
    own: Any = live.installed[0]
    _, labels = live.batch(x, torch.full_like(y, -1))
    assert labels.shape == y.shape
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2}
    # by hand: the nearest centre of what attention leaves, where attention is above the threshold
    features = F.normalize(own.maps(x)[-1], dim=1).detach()
    size = [min(4 * s, 32) for s in features.shape[2:]]
    large = F.normalize(F.interpolate(features, size, mode="bilinear", align_corners=False), dim=1)
    attention = maths.Attention(large.shape[1]).eval()
    attention.load_state_dict(state)
    weights = attention(large).detach()
    nearest = torch.cdist(
        F.normalize(large * weights, dim=1).movedim(1, -1).flatten(1, 2), own.centres[None]
    ).argmin(-1)
    front = (weights.mean(1) >= own.threshold).flatten(1)
    want = torch.where(front, nearest + 1, 0).view(len(x), *size)
    assert (F.interpolate(want[:, None].float(), (32, 32))[:, 0] == labels).float().mean() > 0.99
    # kept: computed once
    live.set_samples(Samples(tmp_path, {"images": "a"}, 16, 1, torch.arange(16)))
    for _ in range(2):
        assert torch.equal(live.batch(x, y)[1], labels)
    about = live.facts()["label_maps"]
    assert about["kept"]["hits"] == 16
    assert about["points"] == 16
    assert about["cpu_s"]["clustering"] > 0
    again = wrap(_dense(), LabelMaps(base=base, clusters=2, images=16), task="segmentation")
    again.load_state_dict(live.state_dict())
    assert torch.equal(again.batch(x, y)[1], labels)
    assert "cpu_s" not in again.facts()["label_maps"]  # nothing was clustered
    live.undo()


def test_what_is_clustered_of_an_image() -> None:
    """Features weighed by attention, of the foreground alone; of all places where there is none."""
    base, (x, y) = _pretrained(), _scenes(5)
    points = {}
    level: Any
    for level in ("image", "attention", "foreground"):
        request = LabelMaps(base=base, clusters=2, level=level, repeats=1)
        live = wrap(_dense(), request, task="segmentation")
        live.feed(train=[(x, y)])
        live.batch(x, y)
        own: Any = live.installed[0]
        features = F.normalize(own.maps(x)[-1], dim=1).detach()
        weights = own._attention(features).detach()
        most = weights.mean(1).flatten(1).amax(1)  # one image has no foreground
        own.threshold = (most.sort().values[0] + most.sort().values[1]).item() / 2
        points[level] = own._points(x).detach()
    weighed = features * weights
    front = (weights.mean(1) >= own.threshold).flatten(1)
    assert front.any(1).sum() == 4
    assert not front.all(1).any()
    assert torch.allclose(points["image"], features.mean((2, 3)), atol=1e-6)
    assert torch.allclose(points["attention"], weighed.mean((2, 3)), atol=1e-6)
    for image, mask, point in zip(weighed.flatten(2), front, points["foreground"], strict=True):
        chosen = image[:, mask] if mask.any() else image
        assert torch.allclose(point, chosen.sum(1) / mask.numel(), atol=1e-6)


def test_pixels_are_clustered_and_the_largest_cluster_is_the_background() -> None:
    base, (x, y) = _dense(), _scenes(8)
    request = LabelMaps(
        base=base, clusters=2, images=8, repeats=2, level="pixel", foreground="largest",
        answers=True,
    )  # fmt: skip
    model = _dense()
    before = model(x)
    live = wrap(model, request, task="segmentation")
    live.feed(train=[(x, y)])
    labels = live.batch(x, y)[1]
    counts = torch.bincount(labels.flatten(), minlength=3)
    assert counts.argmax() == 0
    assert live.facts()["label_maps"]["points"] == labels[:, ::8, ::8].numel()
    assert (counts > 0).all()
    with live.served() as served:
        assert torch.equal(served(x).argmax(1), labels)
    assert torch.equal(model(x), before)


def test_refuses_a_base_without_attention_and_too_few_answers() -> None:
    x, y = _scenes(4)
    live = wrap(_dense(), LabelMaps(base=_dense(), clusters=2, images=4), task="segmentation")
    live.feed(train=[(x, y)])
    with pytest.raises(BadInput, match="has no pixel attention beside it"):
        live.batch(x, y)
    with pytest.raises(BadInput, match="5 clusters and the background are 6 answers"):
        wrap(_dense(), LabelMaps(base=_dense(), clusters=5), task="segmentation")
    plain = ResNet(BasicBlock, (1, 1, 1, 1))
    with pytest.raises(BadInput, match="'label_maps'"):
        wrap(plain, LabelMaps(base=_dense()), task="classification")
