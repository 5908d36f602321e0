"""Data sets: splits, subsets, checks, augmentation and loaders that repeat."""

from __future__ import annotations

import gzip
import hashlib
import struct
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from greenvis import data
from greenvis.data import images, loading
from greenvis.data.sets import fashion_mnist
from greenvis.data.spec import Augment
from greenvis.data.splits import stratified
from greenvis.data.transforms import mix
from greenvis.errors import BadInput

needs_fashion = pytest.mark.skipif(
    not fashion_mnist.DEBIAN.is_dir(),
    reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist",
)


def _images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> None:
    rng = np.random.default_rng(len(str(folder.name)))
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")


def _idx(folder: Path, train: int = 20, test: int = 10) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = bytes(i % 251 for i in range(count * 28 * 28))
        labels = bytes(i % 10 for i in range(count))
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as f:
            f.write(struct.pack(">iiii", 0x803, count, 28, 28) + images)
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as f:
            f.write(struct.pack(">ii", 0x801, count) + labels)


def _prints(dataset: data.ImageSet) -> set[str]:
    images, _ = dataset.batch(range(len(dataset)))
    return {hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in images}


def test_digits_are_split_by_class_with_no_image_in_both() -> None:
    d = data.load(data.DataSpec(name="digits"))
    assert (len(d.train), len(d.test), d.img_size, d.in_chans) == (1347, 450, 8, 1)
    assert not _prints(d.train) & _prints(d.test)
    share = d.test.targets.bincount() / torch.cat([d.train.targets, d.test.targets]).bincount()
    assert torch.all((share - 450 / 1797).abs() < 0.01)
    assert (
        sorted(torch.cat([d.train.targets, d.test.targets]).bincount().tolist())[0] == 174
    )  # as in scikit-learn


def test_images_are_counted_from_both_ends() -> None:
    train = data.load(data.DataSpec(name="digits", train=50)).train
    assert torch.equal(train[-1][0], train[49][0])
    assert train[-1][1] == train[49][1]
    with pytest.raises(IndexError):
        train[50]


def test_training_images_are_normalised() -> None:
    d = data.load(data.DataSpec(name="digits"))
    x, y = d.train.batch(range(len(d.train)))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.mean().abs() < 1e-3
    assert (x.std() - 1).abs() < 1e-3


def test_normalise_equals_the_reference_formula() -> None:
    d = data.load(data.DataSpec(name="digits", train=50))
    stored = d.train.split.images
    assert isinstance(stored, torch.Tensor)
    t = d.train.transform
    assert torch.allclose(
        d.train.batch([3])[0], (stored[3:4] / 255 - t.mean[0]) / t.std[0], atol=1e-6
    )


def test_subsets_are_stratified_nested_and_drawn_by_seed() -> None:
    small, large = (
        data.load(data.DataSpec(name="digits", train=100, seed=3)),
        data.load(data.DataSpec(name="digits", train=200, seed=3)),
    )
    assert small.train.targets.bincount().tolist() == [10] * 10
    assert set(small.train.ids.tolist()) < set(large.train.ids.tolist())
    assert (
        small.train.ids.tolist()
        == data.load(data.DataSpec(name="digits", train=100, seed=3)).train.ids.tolist()
    )
    assert (
        small.train.ids.tolist()
        != data.load(data.DataSpec(name="digits", train=100, seed=4)).train.ids.tolist()
    )
    assert small.checksum == large.checksum


def test_stratified_order_keeps_proportions_of_unequal_classes() -> None:
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    order = stratified(labels, seed=1)
    assert sorted(order.tolist()) == list(range(1000))
    for n in (100, 333, 700):
        expected = torch.tensor([0.9, 0.09, 0.01]) * n
        assert torch.all((labels[order[:n]].bincount(minlength=3) - expected).abs() <= 1)


def test_facts_name_everything_that_shaped_the_batches() -> None:
    facts = data.load(
        data.DataSpec(name="digits", train=100, test=50, augment="crop", views=2, seed=5)
    ).facts()
    assert facts | {"checksum": "", "mean": 0, "std": 0} == {
        "name": "digits",
        "only": None,
        "checksum": "",
        "train": 100,
        "test": 50,
        "classes": 10,
        "img_size": 8,
        "in_chans": 1,
        "augment": "crop",
        "views": 2,
        "mean": 0,
        "std": 0,
        "seed": 5,
    }
    assert len(facts["checksum"]) == 64


@pytest.mark.parametrize("augment", get_args(Augment))
def test_augmentation_follows_seed_epoch_and_image_alone(augment: Augment) -> None:
    train = data.load(
        data.DataSpec(name="synthetic", train=24, test=10, img_size=16, augment=augment, seed=1)
    ).train
    whole, _ = train.batch(range(24), epoch=2)
    assert torch.equal(whole[5], train[(2, 5)][0])
    assert torch.equal(whole[[7, 3]], train.batch([7, 3], epoch=2)[0])
    assert torch.equal(whole[[7, 3]], train.take([3, 7]).batch([1, 0], epoch=2)[0])
    assert torch.equal(whole, train.batch(range(24), epoch=0)[0]) == (augment == "none")


def test_views_repeat() -> None:
    train = data.load(data.DataSpec(name="digits", train=20, augment="crop-flip", views=2)).train
    assert torch.equal(train.batch(range(20), epoch=0)[0], train.batch(range(20), epoch=2)[0])
    assert not torch.equal(train.batch(range(20), epoch=0)[0], train.batch(range(20), epoch=1)[0])


def test_a_view_is_named_by_what_repeats() -> None:
    def seen(augment: Augment, views: int | None) -> list[int]:
        transform = data.load(
            data.DataSpec(name="digits", train=10, augment=augment, views=views)
        ).train.transform
        return [transform.view(epoch) for epoch in range(4)]

    assert seen("crop", 2) == [0, 1, 0, 1]
    assert seen("crop", None) == [0, 1, 2, 3]
    assert seen("none", None) == [0, 0, 0, 0]


def test_crop_is_a_window_of_the_padded_image_and_flip_mirrors_half() -> None:
    plain = data.load(data.DataSpec(name="digits", train=200)).train
    cropped = data.load(data.DataSpec(name="digits", train=200, augment="crop")).train
    x, y = plain.batch(range(200))[0], cropped.batch(range(200))[0]
    black = (0 - plain.transform.mean[0]) / plain.transform.std[0]
    padded = torch.nn.functional.pad(x, [1] * 4, value=black)
    windows = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    assert torch.all((windows - y).abs().amax((2, 3, 4)).min(0).values < 1e-6)
    flipped = data.load(data.DataSpec(name="digits", train=200, augment="crop-flip")).train.batch(
        range(200)
    )[0]
    assert 60 < int((flipped - y).abs().amax((1, 2, 3)).gt(1e-6).sum()) < 140
    assert torch.equal(
        torch.where((flipped == y).all(-1, True).all(-2, True), y, flipped.flip(-1)), y
    )


def test_the_test_set_is_never_augmented() -> None:
    d = data.load(data.DataSpec(name="digits", augment="randaug"))
    assert torch.equal(d.test[(0, 3)][0], d.test[(1, 3)][0])


@pytest.mark.parametrize("augment", ["randaug", "color-jitter"])
def test_global_random_state_is_untouched(augment: Augment) -> None:
    d = data.load(data.DataSpec(name="synthetic", train=20, test=10, augment=augment))
    before = torch.get_rng_state()
    for _ in data.batches(d.train, 8, shuffle=True):
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_mix_is_splitmix64() -> None:
    assert (
        mix(np.array([0]))[0] == 0xE220A8397B1DCDAF
    )  # the first output of the reference generator seeded with 0
    assert len(set(mix(np.arange(1000), 1, 2).tolist())) == 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_and_do_not_depend_on_workers(workers: int) -> None:
    train = data.load(data.DataSpec(name="digits", train=100, augment="crop")).train
    whole = list(data.batches(train, 16, epoch=3, seed=1, shuffle=True))
    rest = list(data.batches(train, 16, epoch=3, seed=1, shuffle=True, start=4, workers=workers))
    assert [len(y) for _, y in whole] == [16] * 6 + [4]
    assert len(rest) == 3
    for (x, y), (again_x, again_y) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)


def test_batches_shuffle_by_seed_and_epoch_and_tell_positions() -> None:
    train = data.load(data.DataSpec(name="digits", train=50)).train

    def visits(**options: int) -> list[int]:
        return [
            int(p)
            for _, _, ps in data.batches(train, 7, shuffle=True, positions=True, **options)
            for p in ps
        ]

    assert sorted(visits()) == list(range(50))
    assert visits(epoch=1) == visits(epoch=1) != visits(epoch=2)
    assert visits(seed=1) != visits(seed=2)
    assert visits(epoch=1, seed=2) == data.order(50, epoch=1, seed=2, shuffle=True).tolist()
    assert len(data.batches(train, 7, drop_last=True)) == 7


def test_batches_take_any_data_set_and_plain_loaders_take_ours() -> None:
    train = data.load(data.DataSpec(name="digits", train=50)).train
    x, y = next(iter(DataLoader(train, batch_size=8)))
    ours = next(iter(data.batches(train, 8)))
    assert torch.equal(x, ours[0])
    assert torch.equal(y, ours[1])
    other = TensorDataset(torch.arange(6.0), torch.arange(6))
    assert [len(b) for b, _ in data.batches(other, 4)] == [4, 2]


def test_img_size_and_channels_are_brought_to_what_is_asked() -> None:
    d = data.load(data.DataSpec(name="digits", train=20, test=10, img_size=16, in_chans=3))
    x, _ = d.train.batch([0, 1])
    assert x.shape == (2, 3, 16, 16)
    assert torch.equal(x[:, 0], x[:, 1])
    grey = data.load(data.DataSpec(name="synthetic", train=20, test=10, in_chans=1))
    assert grey.train[0][0].shape == (1, 32, 32)


def test_images_brought_to_size_at_once_or_by_batch_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once = data.load(
        data.DataSpec(name="digits", train=20, test=10, img_size=20, in_chans=3, augment="crop")
    ).train.batch(range(20))
    monkeypatch.setattr(loading, "IN_MEMORY", 0)
    by_batch = data.load(
        data.DataSpec(name="digits", train=20, test=10, img_size=20, in_chans=3, augment="crop")
    ).train.batch(range(20))
    assert torch.equal(at_once[0], by_batch[0])


def test_synthetic_follows_its_seed_and_is_neither_trivial_nor_hopeless() -> None:
    from sklearn.linear_model import LogisticRegression

    d = data.load(data.DataSpec(name="synthetic", train=600, test=200, seed=1))
    assert (
        d.checksum
        == data.load(data.DataSpec(name="synthetic", train=600, test=200, seed=1)).checksum
    )
    assert (
        d.checksum
        != data.load(data.DataSpec(name="synthetic", train=600, test=200, seed=2)).checksum
    )
    x, y = d.train.batch(range(600))
    test_x, test_y = d.test.batch(range(200))
    with warnings.catch_warnings(action="ignore"):  # it need not converge
        linear = LogisticRegression(max_iter=50).fit(x.flatten(1), y)
    assert 0.15 < linear.score(test_x.flatten(1), test_y) < 0.8


def test_folder_with_its_own_test_split(tmp_path: Path) -> None:
    _images(tmp_path / "pets" / "train", {"cat": 4, "dog": 5})
    _images(tmp_path / "pets" / "val", {"dog": 2, "cat": 1})
    d = data.load(data.DataSpec(name="folder:pets", img_size=8), tmp_path)
    assert (len(d.train), len(d.test), d.classes) == (9, 3, ("cat", "dog"))
    assert d.test.targets.tolist() == [0, 1, 1]
    assert d.train[0][0].shape == (3, 8, 8)


def test_folder_without_splits_is_divided_by_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _images(tmp_path / "a", {"cat": 10, "dog": 20})
    d = data.load(data.DataSpec(name="folder:a", img_size=8), tmp_path)
    assert d.test.targets.bincount().tolist() == [2, 4]
    assert not _prints(d.train) & _prints(d.test)
    monkeypatch.setattr(loading, "IN_MEMORY", 0)
    lazy = data.load(data.DataSpec(name="folder:a", img_size=8), tmp_path)
    assert torch.equal(lazy.train.batch([0, 5])[0], d.train.batch([0, 5])[0])
    (tmp_path / "a" / "cat" / "000.png").write_bytes(
        (tmp_path / "a" / "cat" / "001.png").read_bytes()
    )
    assert data.load(data.DataSpec(name="folder:a", img_size=8), tmp_path).checksum != d.checksum


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    _images(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "cat" / "001.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match=r"001\.png"):
        data.load(data.DataSpec(name=f"folder:{tmp_path}", img_size=8))


def test_hf_datasets_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'greenvis[datasets]'")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {
        "picture": [
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(10)
        ],
        "kind": [0, 1] * 5,
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(
        {"train": whole.select(range(8)), "test": whole.select([8, 9])}
    ).save_to_disk(tmp_path / "two")
    d = data.load(data.DataSpec(name="hf-datasets:two", img_size=9), tmp_path)
    assert (len(d.train), len(d.test), d.classes) == (8, 2, ("no", "yes"))
    assert d.test.targets.tolist() == [0, 1]
    whole.save_to_disk(tmp_path / "one")
    assert len(data.load(data.DataSpec(name="hf-datasets:one", img_size=9), tmp_path).test) == 2
    whole.remove_columns("picture").save_to_disk(tmp_path / "none")
    with pytest.raises(BadInput, match="column of type Image"):
        data.load(data.DataSpec(name="hf-datasets:none"), tmp_path)


def test_fashion_mnist_from_a_given_folder(tmp_path: Path) -> None:
    _idx(tmp_path / "idx")
    d = data.load(data.DataSpec(name="fashion-mnist", root="idx"), tmp_path)
    assert (len(d.train), len(d.test), d.img_size) == (20, 10, 28)
    stored = d.train.split.images
    assert isinstance(stored, torch.Tensor)
    assert stored[1, 0, 0, :3].tolist() == [784 % 251, 785 % 251, 786 % 251]
    path = tmp_path / "idx" / "train-images-idx3-ubyte.gz"
    with gzip.open(path) as f:
        raw = f.read()
    with gzip.open(path, "wb") as f:
        f.write(raw[:-1])
    with pytest.raises(BadInput, match="not a whole IDX file"):
        data.load(data.DataSpec(name="fashion-mnist", root="idx"), tmp_path)


@pytest.mark.data
@needs_fashion
def test_fashion_mnist_of_debian() -> None:
    d = data.load(data.DataSpec(name="fashion-mnist", train=1000, test=500))
    assert d.train.targets.bincount().tolist() == [100] * 10
    assert (
        data.load(data.DataSpec(name="fashion-mnist", train=10, test=10)).classes[9] == "Ankle boot"
    )
    whole = data.load(data.DataSpec(name="fashion-mnist")).train
    assert len(whole) == 60_000
    assert whole.transform.mean[0] == pytest.approx(
        0.286, abs=0.005
    )  # of all images: 0.2860 and 0.3530
    assert whole.transform.std[0] == pytest.approx(0.353, abs=0.005)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fashion_mnist", {}, "did you mean 'fashion-mnist'"),
        ("folder", {}, "did you mean 'folder:PATH'"),
        ("digits:here", {}, "did you mean 'digits'"),
        ("digits", {"train": 1348}, "asks for 1348 images, but 'digits' has 1347"),
        ("digits", {"test": 0}, "test: input should be greater than 0, not 0"),
        ("digits", {"augment": "crop_flip"}, "did you mean 'crop-flip'"),
        ("digits", {"in_chans": 2}, "in_chans: input should be 1 or 3, not 2"),
        ("digits", {"img_size": 2}, "img_size: input should be greater than or equal to 4, not 2"),
        ("digits", {"views": 0}, "views: input should be greater than 0, not 0"),
        ("digits", {"root": "x"}, "takes no root, which would change nothing; leave it out"),
        ("fashion-mnist", {"root": "nowhere"}, "apt-get install dataset-fashion-mnist"),
        ("folder:nowhere", {}, "no folder at"),
        ("hf-datasets:nowhere", {}, "local folder"),
    ],
)
def test_bad_input_is_named_before_anything_is_loaded(
    name: str, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        data.check(data.DataSpec(name=name, **options), tmp_path)
    with pytest.raises(BadInput, match=message):
        data.load(data.DataSpec(name=name, **options), tmp_path)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _images(tmp_path / "one", {"cat": 2})
    with pytest.raises(BadInput, match="1 sub-folders"):
        data.check(data.DataSpec(name="folder:one"), tmp_path)
    _images(tmp_path / "more" / "train", {"cat": 2, "dog": 2})
    _images(tmp_path / "more" / "test", {"cat": 2, "cow": 2})
    with pytest.raises(BadInput, match="'cow'"):
        data.load(data.DataSpec(name="folder:more"), tmp_path)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "b").mkdir()
    with pytest.raises(BadInput, match="no images in"):
        data.load(data.DataSpec(name="folder:empty"), tmp_path)
    _images(tmp_path / "few", {"cat": 4, "dog": 4})
    with pytest.raises(BadInput, match="train asks for 9 images"):
        data.load(data.DataSpec(name="folder:few", train=9), tmp_path)
    with pytest.raises(BadInput, match="batch_size is 0"):
        data.batches(data.load(data.DataSpec(name="digits", train=10)).train, 0)


def test_classes_choose_and_relabel_by_name_or_number() -> None:
    whole = data.load(data.DataSpec(name="digits"))
    some = data.load(data.DataSpec(name="digits", classes=["7", 3, "1"], train=90))
    assert some.classes == ("7", "3", "1")
    assert len(some.train) == 90
    assert some.train.targets.bincount().tolist() == [30, 30, 30]
    sevens = {
        row
        for row, y in zip(whole.test.ids.tolist(), whole.test.targets.tolist(), strict=True)
        if y == 7
    }
    assert {
        row
        for row, y in zip(some.test.ids.tolist(), some.test.targets.tolist(), strict=True)
        if y == 0
    } == sevens
    assert (
        some.facts() != data.load(data.DataSpec(name="digits", classes=[7, 3, 2], train=90)).facts()
    )


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([1, 10], "no class 10"),
        (["1", "x"], "no class 'x'"),
        ([1, "1"], "each once"),
        ([3], "two or more"),
    ],
)
def test_classes_that_are_not_there_are_refused(classes: list[str | int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        data.load(data.DataSpec(name="digits", classes=classes))


def test_images_are_held_out_of_the_training_set_and_nowhere_else() -> None:
    plain = data.load(data.DataSpec(name="digits", train=200, test=50))
    held = data.load(data.DataSpec(name="digits", train=200, test=50, held_out=80))
    assert plain.held_out is None
    assert held.held_out is not None
    assert torch.equal(held.train.ids, plain.train.ids)
    assert torch.equal(held.test.ids, plain.test.ids)
    assert len(held.held_out) == 80
    assert not set(held.held_out.ids.tolist()) & set(held.train.ids.tolist())
    assert held.facts() == plain.facts() | {"held_out": 80}
    everything = data.load(data.DataSpec(name="digits", held_out=100))
    assert len(everything.train) == 1347 - 100
    assert (
        data.load(
            data.DataSpec(name="digits", train=200, test=50, held_out=80, augment="crop")
        ).held_out.transform.augment
        == "none"
    )
    with pytest.raises(BadInput, match="1400"):
        data.load(data.DataSpec(name="digits", train=1300, held_out=100))


@pytest.mark.parametrize(("suffix", "mode"), [("png", "I;16"), ("tiff", "I;16"), ("pgm", "I")])
def test_grey_pixels_of_sixteen_bits_are_scaled(tmp_path: Path, suffix: str, mode: str) -> None:
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}")
    with Image.open(tmp_path / f"deep.{suffix}") as image:
        assert image.mode == mode
        shown = images._to_tensor(image)
    assert shown.shape == (3, 256, 256)
    assert torch.equal(shown[0], torch.from_numpy(np.rint(pixels / 257).astype(np.uint8)))
    assert torch.equal(shown[0], shown[2])


def test_grey_pixels_from_0_to_1_are_scaled_and_others_refused(tmp_path: Path) -> None:
    for name, pixels in (
        ("unit", np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)),
        ("wide", np.array([[0.0, 2.0]], dtype=np.float32)),
        ("broken", np.array([[0.0, np.nan]], dtype=np.float32)),
        ("whole", np.array([[0, 200]], dtype=np.int32)),
    ):
        Image.fromarray(pixels).save(tmp_path / f"{name}.tiff")
    paths = [tmp_path / f"{name}.tiff" for name in ("unit", "wide", "broken", "whole")]
    assert images._read_file(paths, 0)[1].flatten().tolist() == [0, 51, 102, 153, 204, 255]
    for row in (1, 2, 3):
        with pytest.raises(BadInput, match=f"{paths[row].name}: its pixels"):
            images._read_file(paths, row)


def test_a_folder_of_deep_pictures_is_not_white(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 65536, (9, 7), dtype=np.uint16)).save(
                tmp_path / name / f"{i}.png"
            )
    train = data.load(data.DataSpec(name=f"folder:{tmp_path}", img_size=8, in_chans=1)).train
    assert 0.3 < train.transform.mean[0] < 0.7
    assert train.transform.std[0] > 0.1
