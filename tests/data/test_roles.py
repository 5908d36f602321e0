"""Labels of every kind, and images in their roles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from greenvis.data import ImageSet, Split
from greenvis.data.splits import Boxes, Lazy, divide
from greenvis.data.transforms import Transform

IDS = torch.arange(3)


def _pictures(height: int, width: int) -> Tensor:
    """Return three pictures whose left columns are white."""
    images = torch.zeros(3, 1, height, width, dtype=torch.uint8)
    images[..., : width // 4] = 255
    return images


def _boxes(*corners: list[float], canvas: tuple[int, int]) -> dict[str, Tensor]:
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor(corners).reshape(-1, 4),
        format="XYXY",  # type: ignore[call-arg]
        canvas_size=canvas,
    )
    return {"boxes": boxes, "labels": torch.arange(1, len(corners) + 1)}


@pytest.mark.parametrize(
    ("labels", "kind", "known"),
    [
        (torch.tensor([0, -1, 2]), "class", [True, False, True]),
        (torch.tensor([[0, 1], [-1, -1], [-1, 1]], dtype=torch.int8), "multilabel", [1, 0, 1]),
        (torch.tensor([[-1.0], [torch.nan], [2.0]]), "number", [1, 0, 1]),
        (torch.tensor([[[0]], [[-1]], [[3]]], dtype=torch.int16), "mask", [1, 0, 1]),
        (Lazy(lambda row: torch.zeros(4, 4), range(3)), "mask", [1, 1, 1]),
        (Boxes(lambda row: {}, range(3)), "box", [1, 1, 1]),
    ],
)
def test_the_form_of_labels_says_their_kind_and_which_are_known(
    labels: Tensor | Lazy, kind: str, known: list[bool]
) -> None:
    split = Split(_pictures(4, 4), labels)
    assert split.kind == kind
    assert split.known.tolist() == known
    assert split.take(torch.tensor([2, 0])).kind == kind
    hidden = split.without_labels()
    assert hidden.labels.tolist() == [-1, -1, -1]
    assert not hidden.known.any()


def test_what_has_no_label_is_never_in_the_test_that_is_divided_off() -> None:
    labels = torch.tensor([0, 1] * 10 + [-1] * 30)
    train, test = divide(Split(torch.zeros(50, 1, 4, 4, dtype=torch.uint8), labels), 8)
    assert test.labels.bincount().tolist() == [4, 4]
    assert int((train.labels == -1).sum()) == 30


@pytest.mark.parametrize("lazy", [False, True])
def test_masks_follow_the_image(lazy: bool) -> None:
    images = _pictures(16, 24)
    masks = (images[:, 0] > 0).to(torch.int16)
    form = Transform(8, 1, augment="crop-flip")
    labels = Lazy(masks.__getitem__, range(3)) if lazy else masks
    images_set = ImageSet(Split(images, labels), IDS, form)
    plain, mask = ImageSet(Split(images, labels), IDS, Transform(8, 1)).batch([0, 1, 2])
    assert mask.dtype == torch.int64
    assert torch.equal(mask[:, :, 1:], (plain[:, 0, :, 1:] > 0.5).long())
    seen = set()
    for epoch in range(8):
        x, mask = images_set.batch([0, 1, 2], epoch)
        shown = mask >= 0  # what came in from outside is not known
        assert torch.equal((x[:, 0] > 0.5)[shown], (mask == 1)[shown])
        assert not x[:, 0][~shown].any()
        seen |= {tuple(m.flatten().tolist()) for m in mask}
    assert len(seen) > 4


def test_boxes_follow_the_image_and_leave_with_what_is_cut_off() -> None:
    images = torch.zeros(3, 1, 16, 24, dtype=torch.uint8)
    images[:, :, 4:12, 8:16] = 255
    every = _boxes([8, 4, 16, 12], [0, 0, 3, 3], canvas=(16, 24))
    split = Split(images, Boxes(lambda row: every, range(3)))
    x, y = ImageSet(split, IDS, Transform(8, 1)).batch([0, 1, 2])
    # half the size, then two columns less on each side: the second lies beyond them
    assert y[0]["boxes"].tolist() == [[2, 2, 6, 6]]
    assert y[0]["labels"].tolist() == [1]
    augmented = ImageSet(split, IDS, Transform(8, 1, augment="crop-flip"))
    for epoch in range(8):
        x, y = augmented.batch([0, 1, 2], epoch)
        for image, target in zip(x, y, strict=True):
            (box,) = target["boxes"].long().tolist()
            rows, columns = (image[0] > 0.5).nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_several_labels_and_numbers_come_as_floats() -> None:
    several = torch.tensor([[0, 1], [1, -1], [0, 0]], dtype=torch.int8)
    y = ImageSet(Split(_pictures(8, 8), several), IDS, Transform(8, 1)).batch([1, 0])[1]
    assert y.dtype == torch.float32
    assert y.tolist() == [[1, -1], [0, 1]]
