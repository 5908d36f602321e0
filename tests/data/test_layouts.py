"""Crops pasted by a layout, with the masks and boxes that belong to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from greenvis.data import layouts
from greenvis.data.layouts import Crop, Item
from greenvis.data.transforms import bounding_boxes
from greenvis.errors import BadInput

CLASSES = ("background", "cat", "dog")


def _crop(label: int = 2, side: int = 4) -> Crop:
    alpha = torch.ones(side, side, dtype=torch.bool)
    alpha[0, 0] = False
    return Crop(torch.full((3, side, side), 200, dtype=torch.uint8), alpha, label)


def test_regions_of_a_mask_are_cut_one_by_one() -> None:
    mask = torch.zeros(12, 14, dtype=torch.int64)
    mask[1:6, 2:7] = 1
    mask[1, 2] = 0  # not of the region
    mask[7:11, 8:13] = 1
    mask[0, 12] = 2  # too small
    pixels = torch.arange(12 * 14).view(1, 12, 14).to(torch.uint8)
    first, second = layouts.cut(pixels, mask)
    assert torch.equal(first.pixels, pixels[:, 1:6, 2:7])
    assert first.alpha.sum() == 24
    assert not first.alpha[0, 0]
    assert torch.equal(second.pixels, pixels[:, 7:11, 8:13])
    assert (first.label, second.label) == (1, 1)


def test_a_crop_of_the_boxs_size_is_pasted_pixel_by_pixel() -> None:
    pixels, mask = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.ones(16, 16, dtype=torch.int64)
    item = Item(2, (0.5, 0.25, 0.75, 0.5))
    image, made = layouts.paste(pixels, mask, [(_crop(), item)])
    expected, labels = pixels.clone(), mask.clone()
    for y in range(4):
        for x in range(4):
            if (y, x) != (0, 0):
                expected[:, 4 + y, 8 + x] = 200
                labels[4 + y, 8 + x] = 2
    assert torch.equal(image, expected)
    assert torch.equal(made, labels)
    assert pixels.sum() == 0  # what was there is left as it was
    assert (mask == 1).all()


def test_boxes_are_those_of_what_can_be_seen() -> None:
    corners = torch.tensor([[0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 16.0, 16.0]])
    target = {"boxes": bounding_boxes(corners, (16, 16)), "labels": torch.tensor([1, 1])}
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    over = (Crop(torch.ones(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8).bool(), 2),
            Item(2, (0.0, 0.0, 0.5, 0.5)))  # fmt: skip
    _, made = layouts.paste(pixels, target, [over])
    assert made["boxes"].tolist() == [[8.0, 8.0, 16.0, 16.0], [0.0, 0.0, 8.0, 8.0]]
    assert made["labels"].tolist() == [1, 2]


def test_an_object_keeps_its_shape_within_its_box() -> None:
    wide = Crop(torch.ones(3, 4, 8, dtype=torch.uint8), torch.ones(4, 8).bool(), 1)
    mask = torch.zeros(16, 16, dtype=torch.int64)
    _, made = layouts.paste(
        torch.zeros(3, 16, 16, dtype=torch.uint8), mask, [(wide, Item(1, (0, 0, 1, 1)))]
    )
    rows, columns = made.nonzero(as_tuple=True)
    assert (int(rows.min()), int(rows.max()) + 1) == (4, 12)
    assert (int(columns.min()), int(columns.max()) + 1) == (0, 16)


def test_the_rule_gives_each_class_its_number_inside_the_image() -> None:
    made = layouts.rule({1: 3, 2: 5}, torch.Generator().manual_seed(0))
    assert [items[0].label for items in made] == [1] * 3 + [2] * 5
    for (item,) in made:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


def test_a_file_says_what_stands_where(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps([[{"class": "dog", "box": [0, 0.5, 0.5, 1]}, {"class": 1,
                                 "box": [0.1, 0.1, 0.2, 0.2]}]]))  # fmt: skip
    ((dog, cat),) = layouts.read(path, CLASSES)
    assert (dog, cat.label) == (Item(2, (0, 0.5, 0.5, 1)), 1)
    for content, why in (
        ({}, "a list of images"),
        ([], "a list of images"),
        ([[]], "image 1 is no list"),
        ([[{"class": "dgo", "box": [0, 0, 1, 1]}]], "'dog'"),
        ([[{"class": 0, "box": [0, 0, 1, 1]}]], "no class 0"),
        ([[{"class": True, "box": [0, 0, 1, 1]}]], "no class True"),
        ([[{"class": "dog", "box": [0, 0, 0, 1]}]], "is no box"),
        ([[{"class": "dog", "box": [0, 0, 2, 1]}]], "is no box"),
        ([[{"class": "dog", "box": [0, float("nan"), 1, 1]}]], "is no box"),
        ([[{"class": ["dog"], "box": "wide"}]], "no class"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(BadInput, match=why):
            layouts.read(path, CLASSES)
