"""Labels of every kind, and images in their roles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from greenvis import data
from greenvis.core.example import Example
from greenvis.data import DataSet, ImageSet, Split, Stored, assignment, dataset
from greenvis.data.bags import Bags
from greenvis.data.changes import SEVERITIES
from greenvis.data.splits import Boxes, Lazy, divide
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput

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
    resized = ImageSet(Split(images, labels), IDS, Transform(8, 1, augment="random-resized-crop"))
    for epoch in range(8):
        x, mask = resized.batch([0, 1, 2], epoch)
        far = (x[:, 0] - 0.5).abs() > 0.49  # but where an edge is smoothed
        assert torch.equal((x[:, 0] > 0.5)[far], (mask == 1)[far])
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


def test_boxes_follow_a_resized_crop_and_augmentation_without_a_rule_is_refused() -> None:
    images = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 8:24, 8:24] = 255
    split = Split(images, Boxes(lambda row: _boxes([8, 8, 24, 24], canvas=(32, 32)), range(3)))
    train = ImageSet(split, IDS, Transform(32, 1, augment="random-resized-crop"))
    shown = 0
    for epoch in range(8):
        for image, target in zip(*train.batch([0, 1, 2], epoch), strict=True):
            rows, columns = (image[0] > 0.5).nonzero().unbind(1)
            for box in target["boxes"].tolist():
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box == pytest.approx([float(e) for e in edges], abs=1.01)
                shown += 1
    assert shown > 20
    pool = data.Data("boxes", train, train, ("", "square"), "0" * 64)
    with pytest.raises(BadInput, match="augmix has no rule for labels of kind box"):
        assignment.assign(pool, data.DataSpec(name="boxes", augment="augmix"), 0)


def test_several_labels_and_numbers_come_as_floats() -> None:
    several = torch.tensor([[0, 1], [1, -1], [0, 0]], dtype=torch.int8)
    y = ImageSet(Split(_pictures(8, 8), several), IDS, Transform(8, 1)).batch([1, 0])[1]
    assert y.dtype == torch.float32
    assert y.tolist() == [[1, -1], [0, 1]]


def _load(seed: int = 0, **fields: Any) -> data.Data:
    return data.load(data.DataSpec(**{"name": "digits", "train": 400, **fields}), seed=seed)


def _ids(images: ImageSet | None) -> set[int]:
    assert images is not None
    return set(images.ids.tolist())


@pytest.mark.parametrize("seed", [0, 3])
def test_budgets_of_labels_are_nested_by_class_and_leave_the_rest(seed: int) -> None:
    every = _ids(_load().train)
    before: set[int] = set()
    for budget in (0.05, 40, {"per_class": 8}, 200, 1.0):
        some = _load(seed, labels=budget, unlabeled=None if budget == 1.0 else "rest")
        assert before <= _ids(some.train) or isinstance(budget, dict)
        before = _ids(some.train)
        counts = some.train.targets.bincount()
        assert counts.max() - counts.min() <= 2
        assert some.train.known.all()
        if some.unlabeled is None:
            continue
        assert _ids(some.unlabeled) == every - before
        assert not some.unlabeled.known.any()
        assert some.unlabeled.batch([0, 1])[1].tolist() == [-1, -1]
    assert before == every


def test_seeds_draw_other_labels_and_arms_of_one_seed_the_same() -> None:
    first, again, other = (_load(seed, labels=40) for seed in (0, 0, 1))
    assert _ids(first.train) == _ids(again.train) != _ids(other.train)
    assert first.facts() == other.facts()  # of what runs of all seeds are known by
    assert _ids(_load(0, labels=40, augment="crop").train) == _ids(first.train)
    spec = data.DataSpec(name="digits", train=400, labels=40, seed=1)
    assert _ids(data.load(spec).train) != _ids(first.train)
    assert _ids(first.test) == _ids(_load().test)


def test_a_number_of_unlabelled_images_is_nested_too() -> None:
    few, more = (_ids(_load(labels=40, unlabeled=n).unlabeled) for n in (50, 100))
    assert len(few) == 50
    assert few < more
    with pytest.raises(BadInput, match="unlabeled asks for 361 images, but 360"):
        _load(labels=40, unlabeled=361)
    with pytest.raises(BadInput, match="no training image remains for unlabeled"):
        _load(unlabeled="rest")
    with pytest.raises(BadInput, match="labels asks for 401, but there are 400"):
        _load(labels=401)
    with pytest.raises(BadInput, match="labels asks for 90 a class"):
        _load(labels={"per_class": 90})


def test_no_label_at_all_leaves_all_images_unknown() -> None:
    none = _load(labels=0)
    assert _ids(none.train) == _ids(_load().train)
    assert not none.train.known.any()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "pairs"])
def test_noise_is_as_much_as_asked_for_nested_and_repeatable(kind: str) -> None:
    clean = _load(classes=(0, 1, 2, 3, 4), train=300)
    wrong_before: dict[int, int] = {}
    for rate in (0.2, 0.4):
        noise = {"rate": rate, "kind": kind}
        noisy = _load(classes=(0, 1, 2, 3, 4), train=300, noise=noise)
        assert _ids(noisy.train) == _ids(clean.train)
        truth, labels = noisy.truth, noisy.train.targets
        assert truth is not None
        assert torch.equal(truth, clean.train.targets)
        at = truth != labels
        eligible = (truth % 2 == 0).sum() if kind == "asymmetric" else len(truth)
        assert int(at.sum()) == round(rate * int(eligible))
        if kind == "symmetric":
            assert len(set(((labels - truth) % 5)[at].tolist())) == 4
        else:
            assert set(((labels - truth) % 5)[at].tolist()) == {1}
        wrong = dict(zip(noisy.train.ids[at].tolist(), labels[at].tolist(), strict=True))
        assert wrong_before.items() <= wrong.items()
        wrong_before = wrong
        assert torch.equal(_load(1, classes=(0, 1, 2, 3, 4), train=300, noise=noise).test.targets,
                           clean.test.targets)  # fmt: skip
    again = _load(classes=(0, 1, 2, 3, 4), train=300, noise={"rate": 0.4, "kind": kind})
    other = _load(1, classes=(0, 1, 2, 3, 4), train=300, noise={"rate": 0.4, "kind": kind})
    assert torch.equal(again.train.targets, noisy.train.targets)
    assert not torch.equal(other.train.targets, noisy.train.targets)
    assert (
        data.DataSpec(name="digits", noise=0.4).noise
        == data.DataSpec(name="digits", noise={"rate": 0.4}).noise
    )


def test_noise_spoils_no_image_held_out() -> None:
    clean, noisy = _load(held_out=50), _load(held_out=50, noise=0.5)
    assert clean.held_out is not None
    assert noisy.held_out is not None
    assert torch.equal(clean.held_out.targets, noisy.held_out.targets)


def test_a_long_tail_has_the_ratio_asked_for_and_as_many_images_as_can_be() -> None:
    long = _load(train=1000, imbalance=20)
    counts = long.train.targets.bincount().tolist()
    assert counts[0] == pytest.approx(20 * counts[-1], rel=0.1)
    assert counts == sorted(counts, reverse=True)
    steps = [a / b for a, b in pairwise(counts)]
    assert max(steps) < 1.8  # 20 ** (1 / 9) = 1.39, and rounding
    assert counts[0] == _load(train=1000).train.targets.bincount()[0]
    budget = _load(train=1000, imbalance=20, labels=60, unlabeled="rest")
    assert _ids(budget.train) | _ids(budget.unlabeled) == _ids(long.train)


def test_domains_deal_out_images_and_name_tests() -> None:
    domains = {
        "train": ["plain", "noise"], "unlabeled": ["invert"], "target": ["rotate:90"],
        "test": ["plain", "noise", "blur:2"],
    }  # fmt: skip
    some = _load(labels=100, unlabeled=120, domains=domains)
    plain = _load()
    assert list(some.tests) == ["plain", "noise", "blur:2"]
    assert some.test is some.tests["plain"]
    sets = [_ids(part) for part in (some.train, some.unlabeled, some.target)]
    assert [len(part) for part in sets] == [100, 120, 180]
    assert set.union(*sets) == _ids(plain.train)
    x, y = some.train.batch(range(100))
    assert y.bincount().min() >= 9
    shown = dict(zip(plain.train.ids.tolist(), plain.train.batch(range(400))[0], strict=True))
    same = [bool(torch.equal(a, shown[i])) for a, i in zip(x, some.train.ids.tolist(), strict=True)]
    assert same == [True] * 50 + [False] * 50
    assert some.target is not None
    turned = torch.stack([shown[i] for i in some.target.ids.tolist()]).rot90(1, (2, 3))
    assert torch.allclose(some.target.batch(range(180))[0], turned, atol=1e-4)
    assert torch.equal(some.tests["plain"].batch([3])[0], plain.test.batch([3])[0])
    assert some.facts()["tests"] == {"plain": 450, "noise": 450, "blur:2": 450}
    assert some.facts()["target"] == 180


@pytest.mark.parametrize("name", list(SEVERITIES))
def test_a_change_hangs_on_the_image_alone_and_keeps_its_range(name: str) -> None:
    some = _load(domains={"test": [name]}).test
    x, _ = some.batch([0, 1, 2])
    assert torch.allclose(some.batch([2])[0][0], x[2], atol=1e-6)
    assert torch.allclose(some.batch([2], 5)[0][0], x[2], atol=1e-6)
    assert not torch.equal(x, _load().test.batch([0, 1, 2])[0])
    form = some.transform
    pixels = x * form.std[0] + form.mean[0]
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_changes_follow_their_severity() -> None:
    plain = _load().test
    form = plain.transform
    x = plain.batch(range(50))[0] * form.std[0] + form.mean[0]

    def shown(name: str) -> Tensor:
        images = _load(domains={"test": [name]}).test
        return images.batch(range(50))[0] * form.std[0] + form.mean[0]

    assert torch.allclose(shown("invert"), 1 - x, atol=1e-5)
    assert torch.allclose(shown("brightness:0.2"), (x + 0.2).clamp(max=1), atol=1e-5)
    assert torch.allclose(shown("contrast:1"), x, atol=1e-5)
    assert torch.allclose(shown("noise:0"), x, atol=1e-5)
    assert (shown("noise:0.5") - x).std() > 2 * (shown("noise:0.1") - x).std()
    permuted = shown("permute:3").flatten(1).sort(1).values
    assert torch.allclose(permuted, x.flatten(1).sort(1).values, atol=1e-6)
    with pytest.raises(BadInput, match=r"no domain 'blurr'.*'blur'"):
        _load(domains={"test": ["blurr"]})
    with pytest.raises(BadInput, match="normal blur, in pixels"):
        _load(domains={"test": ["blur:much"]})
    with pytest.raises(BadInput, match="names a domain twice"):
        _load(domains={"test": ["blur", "blur"]})


def test_folders_of_domains_are_read_each_with_a_test_of_its_own(tmp_path: Path) -> None:
    for domain, value in (("photo", 200), ("sketch", 20), ("paint", 90)):
        for name in ("cat", "dog"):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (16, 16), (value + i, value, 0)).save(folder / f"{i}.png")
    fields: dict[str, Any] = {"name": f"folder:{tmp_path}", "img_size": 8, "in_chans": 3}
    domains = {
        "train": ["photo", "paint"], "target": ["sketch"], "test": ["photo", "sketch", "blur"],
    }  # fmt: skip
    some = data.load(data.DataSpec(**fields, domains=domains))
    assert some.classes == ("cat", "dog")
    assert len(some.train) == 32
    assert len(some.train.ids.unique()) == 32
    assert some.target is not None
    assert len(some.target) == 16
    assert not some.target.known.any()
    assert {name: len(part) for name, part in some.tests.items()} == dict.fromkeys(
        ["photo", "sketch", "blur"], 4
    )
    assert some.target.transform.mean == some.train.transform.mean == some.test.transform.mean
    red = some.train.batch(range(32))[0][:, 0].mean()
    assert abs(float(red)) < 0.1  # normalised by the training domains alone
    assert float(some.target.batch(range(16))[0][:, 0].mean()) < -1
    with pytest.raises(BadInput, match="not both"):
        data.load(data.DataSpec(**fields, domains={"train": ["photo", "blur"]}))
    with pytest.raises(BadInput, match="has no domain 'fotos'"):
        data.load(data.DataSpec(**fields, domains={"train": ["fotos"]}))


def test_what_nobody_labelled_is_unlabelled_and_never_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1] * 15 + [-1] * 30)

    class Partly(DataSet):
        name, source, licence = "partly", "here", "CC0-1.0"

        def read(self) -> Stored:
            test = Split(images[:4], labels[:4])
            return Stored(Split(images[4:], labels[4:]), test, ("a", "b"), "0" * 64, 8, 1)

    monkeypatch.setattr(dataset.DOOR, "find", lambda name: Partly)
    spec = data.DataSpec(name="partly")
    assert len(data.load(spec).train) == 26
    assert data.load(spec).unlabeled is None
    some = data.load(spec.model_copy(update={"unlabeled": "rest", "labels": 10}))
    assert (len(some.train), len(some.unlabeled or ())) == (10, 46)
    assert some.unlabeled is not None
    assert not some.unlabeled.known.any()
    few = data.load(spec.model_copy(update={"unlabeled": 20}))
    assert _ids(few.unlabeled) == set(range(26, 46))


def test_images_without_a_label_may_lie_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "more/deep").mkdir(parents=True)
    for number, path in enumerate(("b.png", "deep/a.png", "deep/c.jpg")):
        Image.new("RGB", (12, 9), (number * 60, 20, 20)).save(tmp_path / "more" / path)
    (tmp_path / "more/broken.png").write_bytes(b"no image")
    fields: dict[str, Any] = {"name": "digits", "train": 40, "labels": 20}
    spec = data.DataSpec(**fields, unlabeled="folder:more")
    some = data.load(spec, tmp_path)
    assert some.unlabeled is not None
    assert (len(some.train), len(some.unlabeled)) == (20, 3)
    assert some.unlabeled.batch([0, 1, 2])[0].shape == some.train.batch([0, 1, 2])[0].shape
    assert some.unlabeled.targets.tolist() == [-1, -1, -1]
    assert not _ids(some.unlabeled) & _ids(data.load(data.DataSpec(name="digits")).train)
    assert [text.partition("broken.png: ")[1] for text in some.skipped] == ["broken.png: "]
    located = dataset.find(spec, tmp_path).located()
    assert located.unlabeled == f"folder:{tmp_path / 'more'}"
    rest = data.load(data.DataSpec(**fields, unlabeled="rest"))
    (tmp_path / "more/b.png").unlink()
    sums = {rest.checksum, some.checksum, data.load(spec, tmp_path).checksum}
    assert len(sums) == 3, "what lies in the folder counts"
    (tmp_path / "empty").mkdir()
    for name, says in (("nowhere", "no folder at"), ("empty", "holds no image that can be read")):
        with pytest.raises(BadInput, match=says):
            data.load(data.DataSpec(**fields, unlabeled=f"folder:{name}"), tmp_path)
    with pytest.raises(BadInput, match="unlabeled"):
        data.DataSpec(**fields, unlabeled="more")


def test_bags_are_balanced_and_hold_each_image_once() -> None:
    fields: dict[str, Any] = {"train": 1200, "bags": {"size": 10, "positive": ["9", 3]}}
    some, plain = _load(**fields), _load(train=1200)
    assert some.classes == ("negative", "positive")
    train = some.train
    assert isinstance(train, Bags)
    assert train.targets.bincount().tolist() == [len(train) // 2] * 2
    sizes = torch.tensor([len(rows) for rows in train.members])
    assert sizes.float().mean() == pytest.approx(10, abs=0.6)
    assert sizes.float().std() == pytest.approx(2, abs=0.6)
    every = torch.cat(train.members)
    assert len(every.unique()) == len(every)
    makes = torch.isin(plain.train.targets, torch.tensor([9, 3]))
    for rows, label in zip(train.members, train.targets.tolist(), strict=True):
        own = makes[rows]
        assert bool(own.any()) == bool(label)
        assert own.float().mean() <= 0.5
    x, y = train.batch([5, 2])
    assert isinstance(x, Example)
    assert x.kwargs["bag"].tolist() == [0] * int(sizes[5]) + [1] * int(sizes[2])
    assert torch.equal(
        x.args[0], plain.train.batch(torch.cat([train.members[5], train.members[2]]))[0]
    )
    assert y.tolist() == train.targets[[5, 2]].tolist()
    again, other = _load(**fields), _load(1, **fields)
    assert isinstance(again.train, Bags)
    assert isinstance(other.train, Bags)
    assert [m.tolist() for m in again.train.members] == [m.tolist() for m in train.members]
    assert [m.tolist() for m in other.train.members] != [m.tolist() for m in train.members]
    assert torch.equal(other.test.targets, some.test.targets)  # every run has the same test
    few = _load(**fields, labels=10, unlabeled="rest")
    assert (len(few.train), len(few.unlabeled or ())) == (10, len(train) - 10)
    with pytest.raises(BadInput, match="positive images alone"):
        _load(bags={"positive": list(range(10))})
    with pytest.raises(BadInput, match="make no bags of 300"):
        _load(bags={"positive": [9], "size": 300})
    with pytest.raises(BadInput, match="no text"):
        _load(bags={"positive": [9]}, captions="{name}")


@pytest.mark.parametrize(
    "fields",
    [
        {"bags": {"size": 10, "positive": ["9"]}, "train": 1200},
        {"bags": {"size": 4, "positive": [9, 8, 7, 6, 5, 4, 3]}, "train": 601},
        {"labels": 40, "unlabeled": "rest"},
        {"labels": 0.1},
        {"imbalance": 20},
        {"noise": {"rate": 0.4}},
        {"captions": "a {name}", "labels": 60},
    ],
    ids=str,
)
def test_what_a_record_says_of_the_data_is_the_same_for_every_seed(fields: dict[str, Any]) -> None:
    first = _load(0, **fields).facts()
    for seed in range(1, 6):
        assert _load(seed, **fields).facts() == first


def test_bags_are_shown_in_domains() -> None:
    fields: dict[str, Any] = {"train": 1200, "bags": {"size": 5, "positive": [9]}}
    plain = _load(**fields)
    shown = _load(**fields, domains={"train": ["invert", "blur"], "test": ["plain", "invert"]})
    assert isinstance(shown.train, Bags)
    assert torch.equal(shown.train.targets, plain.train.targets)
    assert shown.test.batch([3])[0].args[0].equal(plain.test.batch([3])[0].args[0])
    (x, inverted) = (d.batch([3])[0].args[0] for d in (plain.test, shown.tests["invert"]))
    form = plain.test.transform
    mean, std = form.mean[0], form.std[0]
    torch.testing.assert_close(inverted * std + mean, 1 - (x * std + mean), atol=1e-5, rtol=0)
    # every training bag is whole in one of its domains
    for bag in range(6):
        own = plain.train.batch([bag])[0].args[0] * std + mean
        other = shown.train.batch([bag])[0].args[0] * std + mean
        turned = (other - (1 - own)).abs().amax((1, 2, 3)) < 1e-4
        assert turned.all() or not turned.any()
    x, y = shown.train.batch(range(len(shown.train)))
    assert len(x) == len(y) == len(shown.train)
    again = shown.train.take([2, 0])
    assert torch.equal(again.batch([1])[0].args[0], shown.train.batch([0])[0].args[0])


def test_bags_come_in_batches_of_a_loader_in_the_order_of_its_seed() -> None:
    train = _load(bags={"size": 5, "positive": [9]}).train
    batches = list(data.batches(train, 4, shuffle=True, seed=2))
    assert sum(len(x) for x, _ in batches) == len(train)
    again = list(data.batches(train, 4, shuffle=True, seed=2, workers=1))
    for (x, y), (u, v) in zip(batches, again, strict=True):
        assert torch.equal(x.args[0], u.args[0])
        assert torch.equal(y, v)


def test_captions_are_of_classes_numbered_by_text_and_end_with_the_last_token() -> None:
    some = _load(captions="A picture of {name}.", labels=60, unlabeled="rest")
    assert some.words is not None
    assert some.words.words == tuple(sorted(["a", "picture", "of", ".", *"0123456789"]))
    x, y = some.train.batch(range(60))
    assert isinstance(x, Example)
    images, tokens = x.args
    assert images.shape == (60, 1, 8, 8)
    assert torch.equal(y, _load(labels=60).train.targets)  # ten texts, in the order of digits
    assert tokens.shape == (60, 6)
    assert set(tokens[:, -1].tolist()) == {some.words.size - 1}
    assert some.words.encode(["a zebra", ""]).tolist() == [
        [some.words.encode(["a"])[0, 0], 1, some.words.size - 1, 0, 0, 0],
        [0] * 6,
    ]
    assert torch.equal(tokens[y == 3].unique(dim=0)[0], tokens[(y == 3).nonzero()[0, 0]])
    test = some.test.batch([0])[0]
    assert isinstance(test, Example)
    assert some.unlabeled is not None
    assert isinstance(some.unlabeled.batch([0])[0], Tensor)  # no text beside it
    for bad in ("a picture", "{name} {other}", "{}{name}"):
        with pytest.raises(BadInput, match="no other braces"):
            data.DataSpec(name="digits", captions=bad)


def test_a_name_of_its_own_is_the_caption_and_is_hidden_with_the_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(2).repeat(20)
    names = tuple(f"thing {i}" for i in range(40))

    class Named(DataSet):
        name, source, licence = "named", "here", "CC0-1.0"

        def read(self) -> Stored:
            parts = [Split(images[s], labels[s], names[s]) for s in (slice(30), slice(30, 40))]
            return Stored(parts[0], parts[1], ("a", "b"), "0" * 64, 8, 1)

    monkeypatch.setattr(dataset.DOOR, "find", lambda name: Named)
    spec = data.DataSpec(name="named", captions="{name}", labels=10, unlabeled="rest")
    some = data.load(spec)
    assert some.words is not None
    texts = {names[i] for i in some.train.ids.tolist()}
    assert {w for t in texts for w in t.split()} == set(some.words.words)  # of training alone
    assert some.train.batch(range(10))[1].unique().numel() == 10
    assert some.unlabeled is not None
    assert some.unlabeled.split.names == ()
    assert not some.unlabeled.known.any()
