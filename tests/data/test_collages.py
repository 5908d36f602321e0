"""Collages: their masks and boxes are those of what was put on, and each seed draws the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from greenvis import data
from greenvis.data import DataSpec, collages, dataset
from greenvis.data.sets import scenes, shapes
from greenvis.data.sets.digits import Digits
from greenvis.errors import BadInput
from greenvis.testing import check_dataset


def white(size: int = 9) -> collages.Items:
    """Two items: a white square (1), and a white one with an empty left half (2)."""
    alpha = torch.ones(2, 1, size, size)
    alpha[1, :, :, : size // 2] = 0
    return collages.Items(alpha.expand(-1, 3, -1, -1), alpha, torch.tensor([1, 2]))


def test_masks_and_boxes_are_those_of_the_items() -> None:
    drawn = collages.draw(white(), 40, 30, seed=0, most=1, sizes=(0.4, 0.6))
    for image, mask, target in zip(drawn.images, drawn.masks, drawn.boxes, strict=True):
        assert (image[:, mask > 0] > 127).all()  # white, but for the edge
        ((left, top, right, bottom),) = target["boxes"].tolist()
        rows, columns = (mask > 0).nonzero(as_tuple=True)
        assert (left, right) == (columns.min(), columns.max() + 1)
        assert (top, bottom) == (rows.min(), rows.max() + 1)
        assert target["labels"].tolist() == mask.unique().tolist()[1:]
        assert 0 <= left < right <= 30
        size = int((mask > 0).sum())
        least, most = (0.4 * 30) ** 2, (0.6 * 30) ** 2
        assert 0.4 * least <= size <= 1.1 * most


def test_a_covered_item_has_no_box() -> None:
    drawn = collages.draw(white(), 200, 30, seed=1, most=4, sizes=(0.9, 1.0))
    counts = [len(target["labels"]) for target in drawn.boxes]
    assert min(counts) == 1
    assert sum(counts) < 1.6 * 200  # 2.5 were put on, each nearly as large as the image
    for mask, target in zip(drawn.masks, drawn.boxes, strict=True):
        assert set(target["labels"].tolist()) <= set(mask.unique().tolist())


def test_fewer_images_are_the_first_of_more() -> None:
    few, many, others = (
        collages.draw(white(), count, 16, seed=seed, most=2, sizes=(0.3, 0.5))
        for count, seed in ((5, 3), (300, 3), (5, 4))
    )
    assert torch.equal(few.images, many.images[:5])
    assert torch.equal(few.masks, many.masks[:5])
    assert not torch.equal(few.images, others.images)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", shapes.KINDS)
def test_shapes_have_each_kind_of_label(kind: str) -> None:
    spec = DataSpec(name=f"shapes:{kind}", train=20, test=10, img_size=48)
    assert check_dataset(shapes.Shapes, spec).outcome == "works"
    images = data.load(spec)
    assert images.classes[-6:] == shapes.DRAWN
    assert ("background" in images.classes) == (kind in ("masks", "boxes"))
    _, y = images.train.batch(range(20))
    if kind == "masks":
        assert y.shape == (20, 48, 48)
        assert 0 < int(y.max()) <= 6
    elif kind == "boxes":
        assert {label for target in y for label in target["labels"].tolist()} <= set(range(1, 7))
    else:
        assert y.shape == (20, 6)
        assert images.train.split.kind == {"counts": "number"}.get(kind, "multilabel")
        assert ((y.sum(1) >= 1) & (y.sum(1) <= 4)).all()


def test_the_kinds_of_labels_agree_on_what_an_image_shows() -> None:
    masks, boxes, labels, counts = (
        dataset.find(DataSpec(name=f"shapes:{kind}", train=30, test=5, img_size=48)).read().train
        for kind in shapes.KINDS
    )
    assert torch.equal(masks.images, boxes.images)
    assert torch.equal(masks.images, labels.images)
    for row in range(30):
        shown = set((labels.labels[row].nonzero()[:, 0] + 1).tolist())
        assert shown == set(boxes.labels[row]["labels"].tolist())
        assert counts.labels[row].tolist() == [
            boxes.labels[row]["labels"].tolist().count(number) for number in range(1, 7)
        ]
        assert shown <= set(masks.labels[row].unique().tolist())


def test_each_shape_is_drawn_as_it_is_named() -> None:
    (items, _), names = shapes._shapes()
    alpha = items.alpha[:, 0]
    filled = dict(zip(names, alpha.mean((1, 2)).tolist(), strict=True))
    assert filled["circle"] == pytest.approx(torch.pi * 0.85**2 / 4, abs=0.01)
    assert filled["square"] == pytest.approx(1.5**2 / 4, abs=0.02)
    assert filled["triangle"] == pytest.approx(3 * 3**0.5 * 0.45**2 / 4, abs=0.01)
    assert filled["cross"] == pytest.approx((4 * 0.28 * 1.7 - 0.56**2) / 4, abs=0.02)
    assert filled["ring"] == pytest.approx(torch.pi * (0.85**2 - 0.45**2) / 4, abs=0.01)
    assert filled["star"] == pytest.approx(5 * 0.95 * 0.4 * 0.5878 / 4, abs=0.01)
    turned = {
        n: bool(torch.allclose(a, a.flip(-1), atol=1e-4)) for n, a in zip(names, alpha, strict=True)
    }
    assert all(turned.values())  # each is its own mirror image


def test_scenes_show_digits_where_fashion_mnist_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_source", lambda: Digits(DataSpec(name="digits")))
    images = data.load(DataSpec(name="scenes", train=30, test=10, held_out=5))
    assert images.classes == ("background", *"0123456789")
    assert (len(images.train), len(images.test), images.img_size) == (30, 10, 48)
    assert images.held_out is not None
    x, y = images.train.batch(range(30))
    assert y.shape == (30, 48, 48)
    inside, outside = x.std(1)[y > 0], x.std(1)[y == 0]
    assert len(inside) > 500
    assert len(outside) > len(inside)


@pytest.mark.slow
def test_grounds_of_objects_are_alike_and_those_of_scenes_are_not() -> None:
    spread = {}
    for name in ("objects", "scenes"):
        images = data.load(DataSpec(name=name, train=40, test=10, normalise=False))
        x, y = images.train.batch(range(40))
        shown = [row.unique().numel() - 1 for row in y]
        assert max(shown) == {"objects": 1, "scenes": 3}[name]
        means = torch.stack([image[:, mask == 0].mean(1) for image, mask in zip(x, y, strict=True)])
        spread[name] = float(means.std(0).mean())
        if name == "objects":
            assert (x == x[:, :1]).all()  # grey
    assert 0 < spread["objects"] < 0.02 < 0.1 < spread["scenes"]


def test_what_shapes_cannot_show_is_refused(tmp_path: Path) -> None:
    for name, root, message in (
        ("shapes:mask", None, "did you mean 'masks'"),
        ("shapes", None, "did you mean 'shapes:LABELS'"),
        ("shapes:masks", "x", "leave it out"),
        ("shapes:emoji-boxes", "x", "greenvis data fetch emoji:google"),
    ):
        with pytest.raises(BadInput, match=message):
            data.check(DataSpec(name=name, root=root), tmp_path)
