"""Images with masks in folders of one's own, and torchvision's segmentation sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from greenvis import data
from greenvis.data import DataSpec, dataset
from greenvis.data.sets import torchvision as tv
from greenvis.data.sets._torchvision_masks import CITY_VALUES, SETS
from greenvis.data.sets.folder import Folder
from greenvis.errors import BadInput
from greenvis.testing import check_dataset

SIZE = (12, 16)


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def mask(
    path: Path, values: list[int], palette: bool = False, size: tuple[int, int] = SIZE
) -> None:
    """Columns of these values, the first twice as wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.array([values[min(i * len(values) // size[1], len(values) - 1)]
                        for i in range(size[1])], np.uint8)  # fmt: skip
    image = Image.fromarray(np.tile(columns, (size[0], 1)))
    if palette:
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    image.save(path)


def _mmseg(root: Path) -> None:
    for part, count in (("train", 5), ("val", 3)):
        for i in range(count):
            paint(root / "img_dir" / part / f"{i}.jpg", i + 10 * count)
            mask(root / "ann_dir" / part / f"{i}.png", [0, 1, 2, 255])


def _by_part(root: Path) -> None:
    for part, count in (("train", 5), ("test", 3)):
        for i in range(count):
            paint(root / part / "images" / f"{i}.jpg", i + 10 * count)
            mask(root / part / "masks" / f"{i}_mask.png", [0, 1, 2, 255], palette=True)


def _flat(root: Path) -> None:
    for i in range(10):
        paint(root / "images" / f"a {i}.png", i)
        mask(root / "masks" / f"a {i}.png", [0, 1, 2, 255])


def _beside(root: Path) -> None:
    for i in range(10):
        paint(root / f"a{i}.jpg", i)
        mask(root / f"a{i}_mask.png", [0, 1, 2, 255])


@pytest.mark.parametrize("layout", [_mmseg, _by_part, _flat, _beside])
def test_layouts_that_people_have(layout: object, tmp_path: Path) -> None:
    layout(tmp_path / "mine")  # type: ignore[operator]
    (tmp_path / "mine" / "classes.txt").write_text("sky\nroad\ncar\n")
    (tmp_path / "mine" / "._a0_mask.png").write_bytes(b"no image")
    spec = DataSpec(name="folder:mine", img_size=8)
    assert check_dataset(Folder, spec, tmp_path).outcome == "works"
    mine = data.load(spec, tmp_path)
    assert mine.classes == ("sky", "road", "car")
    assert len(mine.train) + len(mine.test) in (8, 10)
    x, y = mine.train.batch([0, 1])
    assert x.shape == (2, 3, 8, 8)
    assert y.shape == (2, 8, 8)
    assert y[0, 0].unique().tolist() == [-1, 0, 1, 2]
    y = dataset.find(spec, tmp_path).read().train.labels[0]
    assert y[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 4


def test_black_and_white_masks_are_of_two_classes(tmp_path: Path) -> None:
    for i in range(10):
        paint(tmp_path / "images" / f"{i}.jpg", i)
        mask(tmp_path / "masks" / f"{i}.png", [0, 255])
    mine = dataset.find(DataSpec(name=f"folder:{tmp_path}")).read()
    assert mine.classes == ("background", "foreground")
    assert mine.train.labels[0][0].tolist() == [0] * 8 + [1] * 8


def test_all_that_is_wrong_with_masks_is_said_at_once(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    _flat(mine)
    paint(mine / "images" / "lonely.png", 50)
    mask(mine / "masks" / "nobody.png", [0, 1])
    mask(mine / "masks" / "a 0.png", [0, 1], size=(5, 5))
    paint(mine / "masks" / "a 1.png", 3)
    (mine / "masks" / "a 2.png").write_bytes(b"no image")
    (mine / "classes.txt").write_text("one\n")
    with pytest.raises(BadInput) as caught:
        data.load(DataSpec(name="folder:mine", img_size=8), tmp_path)
    text = str(caught.value)
    for part in (
        "no mask of images/lonely.png",
        "no image of masks/nobody.png",
        "a 0.png: 5×5 pixels, and its image has 16×12",
        "a 1.png: its pixels are of mode RGB",
        "cannot read masks/a 2.png",
        "classes.txt names 1 classes, and masks have 3, up to 2",
        "skip_broken: true",
    ):
        assert part in text, text
    (mine / "classes.txt").unlink()
    shown = data.load(DataSpec(name="folder:mine", img_size=8, skip_broken=True), tmp_path)
    assert len(shown.train) + len(shown.test) == 7
    assert len(shown.facts()["skipped"]) == 5


def test_a_test_without_training_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "val" / "images" / "a.jpg", 0)
    mask(tmp_path / "val" / "masks" / "a.png", [0, 1])
    with pytest.raises(BadInput, match="put the images to train on"):
        data.load(DataSpec(name=f"folder:{tmp_path}", img_size=8))


def _voc(root: Path) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for part, first in (("train", 0), ("val", 3)):
        names = [f"2007_{i}" for i in range(first, first + 3)]
        for name in names:
            paint(base / "JPEGImages" / f"{name}.jpg", int(name[5:]))
            mask(base / "SegmentationClass" / f"{name}.png", [0, 15, 255], palette=True)
        listing = base / "ImageSets" / "Segmentation" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names))


def _sbd(root: Path) -> None:
    for part, first in (("train_noval", 0), ("val", 3)):
        for i in range(first, first + 3):
            paint(root / "img" / f"{i}.jpg", i)
            columns = np.tile(np.array([0] * 8 + [15] * 8, np.uint8), (12, 1))
            (root / "cls").mkdir(exist_ok=True)
            inner = np.array([(columns,)], dtype=[("Segmentation", object)])
            savemat(root / "cls" / f"{i}.mat", {"GTcls": inner})
        (root / f"{part}.txt").write_text("\n".join(str(i) for i in range(first, first + 3)))


def _pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, first in (("trainval", 0), ("test", 4)):
        names = [f"Pug_{i}" for i in range(first, first + 4)]
        for i, name in enumerate(names):
            paint(base / "images" / f"{name}.jpg", first + i)
            mask(base / "annotations" / "trimaps" / f"{name}.png", [2, 3, 1])
        lines = "".join(f"{name} 1 1 1\n" for name in names)
        (base / "annotations" / f"{part}.txt").write_text(lines)


def _cities(root: Path) -> None:
    for part, first in (("train", 0), ("val", 3)):
        for i in range(first, first + 3):
            stem = f"ulm_{i:06}_000019"
            paint(root / "leftImg8bit" / part / "ulm" / f"{stem}_leftImg8bit.png", i)
            mask(root / "gtFine" / part / "ulm" / f"{stem}_gtFine_labelIds.png", [7, 26, 4])


WANT = {
    "VOCSegmentation": (_voc, [-1, 0, 15]),
    "SBDataset": (_sbd, [0, 15]),
    "OxfordIIITPet-masks": (_pets, [-1, 0, 1]),
    "Cityscapes": (_cities, [-1, 0, 13]),
}


@pytest.mark.parametrize("name", SETS)
def test_torchvisions_segmentation_sets_by_name(name: str, tmp_path: Path) -> None:
    make, values = WANT[name]
    (tmp_path / "files").mkdir()
    make(tmp_path / "files")
    spec = DataSpec(name=f"torchvision:{name}", root="files", img_size=8)
    assert check_dataset(tv.Torchvision, spec, tmp_path).outcome == "works"
    images = data.load(spec, tmp_path)
    assert images.classes == SETS[name].classes
    y = dataset.find(spec, tmp_path).read().train.labels[0]
    assert y.shape == SIZE
    assert y.unique().tolist() == values
    x, y = images.test.batch([0, 1])
    assert (x.shape, y.shape) == ((2, 3, 8, 8), (2, 8, 8))


def test_the_classes_of_cityscapes_are_those_of_its_benchmark() -> None:
    from torchvision.datasets import Cityscapes

    known = {c.id: c for c in Cityscapes.classes if c.id >= 0}
    assert [known[v].train_id for v in CITY_VALUES] == [*range(19)]
    assert tuple(known[v].name for v in CITY_VALUES) == SETS["Cityscapes"].classes


def test_a_mask_that_is_none_is_refused_when_it_is_read(tmp_path: Path) -> None:
    _sbd(tmp_path)
    (tmp_path / "cls" / "0.mat").write_bytes(b"no matlab")
    with pytest.raises(BadInput, match=r"cannot read the mask .*0\.mat"):
        data.load(DataSpec(name="torchvision:SBDataset", root=str(tmp_path), img_size=8))


def test_torchvision_has_each_of_them_with_these_arguments() -> None:
    import inspect

    from torchvision import datasets

    for masked in SETS.values():
        for options in masked.splits.values():
            inspect.signature(getattr(datasets, masked.cls)).bind("root", **options)


def test_masks_follow_the_image_where_it_is_cropped(tmp_path: Path) -> None:
    _flat(tmp_path)
    spec = DataSpec(name=f"folder:{tmp_path}", img_size=8, augment="crop-flip")
    _, y = data.load(spec).train.batch(range(4))
    assert y.dtype == torch.int64
