"""Where images come from: each source reads its files once and hands over two splits that share no
image."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import math
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from greenvis.core import files
from greenvis.errors import BadInput, one_line, some

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
DOWNLOADS = Path("~/.cache/greenvis").expanduser()
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# of no other a decoder is asked: some start programs
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_IMAGE = 256 * 2**20  # bytes of an image's file
MOST_PIXELS = 2**26  # of an image: 200 MB once decoded in colour
MOST_IDX = 64 * 2**20  # bytes of an IDX file: Fashion-MNIST's largest has 47 million
TEST_NAMES = ("test", "val", "valid", "validation")
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Lazy:
    """Images read one at a time: `read(row)` gives uint8 (C, H, W), of any size."""

    read: Callable[[int], Tensor]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(self.rows[index])

    def take(self, indices: Iterable[int]) -> Lazy:
        """Return the images at `indices`, still unread."""
        return Lazy(self.read, [self.rows[i] for i in indices])


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W), or Lazy. labels: int64 (N,)."""

    images: Tensor | Lazy
    labels: Tensor

    def take(self, rows: Tensor) -> Split:
        """Return the images and labels at `rows`."""
        images = (
            self.images[rows]
            if isinstance(self.images, Tensor)
            else self.images.take(rows.tolist())
        )
        return Split(images, self.labels[rows])


@dataclass(frozen=True)
class Source:
    """A data set as it is stored: img_size and in_chans are what it has, or is best brought to."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    checksum: str
    img_size: int
    in_chans: int


def stratified(labels: Tensor, seed: int) -> Tensor:
    """Order all rows so that the first n hold each class in proportion (to within one image),
    whatever n.

    Subsets of one seed are therefore nested: the first 100 are among the first 200.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        of_class = shuffled[labels[shuffled] == label]
        rank[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    return shuffled[torch.argsort(rank[shuffled], stable=True)]


def divide(split: Split, test: int) -> tuple[Split, Split]:
    """Divide one split into train and test by class. Always with seed 0, so that every run has the
    same test images."""
    order = stratified(split.labels, seed=0)
    return split.take(order[test:].sort().values), split.take(order[:test].sort().values)


def digits() -> Source:
    """8x8 handwritten digits, embedded in scikit-learn: 1,347 to train and 450 to test (Alpaydin
    and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, test = divide(Split(torch.from_numpy(pixels), torch.from_numpy(labels)), test=450)
    return Source(
        train, test, tuple("0123456789"), sha256([pixels.tobytes(), labels.tobytes()]), 8, 1
    )


def fashion_folder(root: Path | None) -> Path:
    """Return the folder that holds the IDX files of Fashion-MNIST. Raises BadInput with the ways to
    get them."""
    candidates = (
        [root, root / "FashionMNIST" / "raw"]
        if root
        else [DEBIAN, DOWNLOADS / "FashionMNIST" / "raw"]
    )
    for folder in candidates:
        if all(
            _idx_path(folder, part, kind)
            for part in ("train", "t10k")
            for kind in ("images", "labels")
        ):
            return folder
    raise BadInput(
        f"fashion-mnist: its four IDX files are not in {' or '.join(map(str, candidates))}; "
        "get them with `apt-get install dataset-fashion-mnist`, name their folder with `root`, or "
        "set `download: true`"
    )


def fashion_mnist(root: Path | None, download: bool) -> Source:
    """28x28 grey pictures of clothes: 60,000 to train and 10,000 to test (Xiao et al., 2017)."""
    try:
        folder = fashion_folder(root)
    except BadInput:
        if not download:
            raise
        folder = _download_fashion(root or DOWNLOADS)
    parts = [
        _read_idx(folder, part, kind) for part in ("train", "t10k") for kind in ("images", "labels")
    ]
    images, labels, test_images, test_labels = (torch.from_numpy(p) for p in parts)
    for x, y in ((images, labels), (test_images, test_labels)):
        if len(x) != len(y) or not len(y) or int(y.max()) >= len(FASHION):
            raise BadInput(
                f"{folder}: {len(x)} images and {len(y)} labels of {len(FASHION)} classes do not "
                "go together"
            )
    train = Split(images[:, None], labels.long())
    test = Split(test_images[:, None], test_labels.long())
    return Source(train, test, FASHION, sha256(p.tobytes() for p in parts), 28, 1)


def _download_fashion(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"fashion-mnist: download failed ({error}); try `apt-get install dataset-fashion-mnist`"
        ) from error
    return fashion_folder(root)


def _idx_path(folder: Path, part: str, kind: str) -> Path | None:
    stem = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def _read_idx(folder: Path, part: str, kind: str) -> np.ndarray:
    """Read one IDX file: a magic number (0x08 = uint8, then the number of axes), the axes' lengths,
    the bytes."""
    path = _idx_path(folder, part, kind)
    assert path is not None  # fashion_folder found it
    try:
        raw = files.read(path, f"IDX file of {kind}", MOST_IDX)
        raw = (
            gzip.GzipFile(fileobj=io.BytesIO(raw)).read(MOST_IDX + 1)
            if path.suffix == ".gz"
            else raw
        )
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot read {path}: {error}; get the file anew") from error
    axes = 3 if kind == "images" else 1
    head = np.frombuffer(raw, ">u4", count=min(axes + 1, len(raw) // 4))
    shape = tuple(int(n) for n in head[1:])
    if not len(head) or head[0] != 0x0800 + axes or len(raw) != 4 * (axes + 1) + math.prod(shape):
        raise BadInput(f"{path} is not a whole IDX file of {kind}; get the file anew")
    return np.frombuffer(raw, np.uint8, offset=4 * (axes + 1)).reshape(shape).copy()


def image_folder(path: Path) -> Source:
    """One sub-folder a class; `train/` with `test/` or `val/` where there are such, else a fifth of
    each class is the test."""
    inner = next((path / n for n in TEST_NAMES if (path / n).is_dir()), None)
    own = (path / "train").is_dir()
    if inner is not None and not own:
        raise BadInput(f"{path} has a folder '{inner.name}' but none named 'train' beside it")
    images, classes = _class_files(path / "train" if own else path)
    labels = torch.tensor([label for _, label in images])
    train = Split(Lazy(partial(_read_file, [f for f, _ in images]), range(len(images))), labels)
    if own and inner is not None:
        test_images, _ = _class_files(inner, classes)
        test_labels = torch.tensor([label for _, label in test_images])
        test = Split(
            Lazy(partial(_read_file, [f for f, _ in test_images]), range(len(test_images))),
            test_labels,
        )
        images = images + test_images
    else:
        train, test = divide(train, test=max(1, round(TEST_SHARE * len(images))))
    chunks = (c for f, _ in images for c in (str(f.relative_to(path)).encode(), f))
    return Source(train, test, classes, sha256(chunks), 224, 3)


def class_folders(path: Path) -> list[Path]:
    """Return the class folders under `path`, sorted. Raises BadInput where there are fewer than
    two."""
    if not path.is_dir():
        raise BadInput(f"no folder at {path}")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    _check_names(folders)
    if len(folders) < 2:
        raise BadInput(
            f"{path} has {len(folders)} sub-folders; one for each class is needed, at least two"
        )
    return folders


def _class_files(
    path: Path, classes: tuple[str, ...] | None = None
) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    folders = class_folders(path)
    names = classes or tuple(f.name for f in folders)
    unknown = [f.name for f in folders if f.name not in names]
    if unknown:
        raise BadInput(f"{path} has classes that train has not: {some(unknown)}")
    out: list[tuple[Path, int]] = []
    for folder in folders:
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise BadInput(f"no images in {folder}; looked for {some(sorted(IMAGE_SUFFIXES), 10)}")
        _check_names(images)
        for image in images:
            _check_regular(image)
        out += [(image, names.index(folder.name)) for image in images]
    return out, names


def _check_names(paths: Iterable[Path]) -> None:
    """Raise BadInput for a name that is not UTF-8: no record could hold it."""
    for path in paths:
        if any("\ud800" <= c <= "\udfff" for c in str(path)):
            raise BadInput(f"the name of {one_line(path)} is not UTF-8: rename it, or take it out")


def _check_regular(path: Path) -> None:
    """Raise BadInput for what has an image's name and is none: a folder, a pipe, a link to nothing,
    a file beyond all size."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f"cannot read the image {one_line(path)}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(
            f"cannot read the image {one_line(path)}: it is no regular file; take it out"
        )
    if status.st_size > MOST_IMAGE:
        raise BadInput(
            f"cannot read the image {one_line(path)}: {status.st_size:,} bytes, and at most "
            f"{MOST_IMAGE:,} are read"
        )


def _read_file(paths: Sequence[Path], row: int) -> Tensor:
    return _decode(files.read(paths[row], "image", MOST_IMAGE), f"image {paths[row]}")


def _decode(data: bytes, what: str) -> Tensor:
    """Return uint8 (3, height, width). Raises BadInput, saying `what` it is, where the bytes are no
    image of bounded size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if (pixels := math.prod(image.size)) > MOST_PIXELS:
                    raise ValueError(
                        f"it has {pixels:,} pixels, and at most {MOST_PIXELS:,} are decoded"
                    )
                return _to_tensor(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders of strangers' bytes stumble in many ways
        reason = (
            "no image of a known format"
            if isinstance(error, UnidentifiedImageError)
            else error or type(error).__name__
        )
        raise BadInput(f"cannot read the {what}: {reason}") from error


def _to_tensor(image: Image.Image) -> Tensor:
    """Return uint8 (3, height, width), upright. Raises ValueError where pixels are of no known
    range."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of those, 0 to 65,535
        raise ValueError(
            "its pixels are whole numbers of 32 bits, of no known range: save it with 8 or 16 bits"
        )
    upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey pixels of 16 bits, or of 0 to 1, in 8 bits: a plain conversion would cut off all
    above 255, or below 1."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    least, greatest = pixels.min().item(), pixels.max().item()
    most = 1.0 if image.mode == "F" else 65_535
    if not 0 <= least <= greatest <= most:
        raise ValueError(
            f"its pixels of mode {image.mode} are {least:g} to {greatest:g}, and 0 to {most:g} can "
            "be shown"
        )
    return Image.fromarray(np.rint(pixels * (255 / most)).astype(np.uint8))


def hf_folder(path: Path) -> None:
    """Raise BadInput where the local folder or the package `datasets` is missing."""
    if importlib.util.find_spec("datasets") is None:
        raise BadInput("hf-datasets needs the package `datasets`: pip install 'greenvis[datasets]'")
    if not path.is_dir():
        raise BadInput(
            f"hf-datasets: no folder at {path}; give a local folder (datasets on the Hub are not "
            "fetched)"
        )


def hf_datasets(path: Path) -> Source:
    """A data set that `datasets` saved to disk, or a folder it can load (parquet, imagefolder)."""
    hf_folder(path)
    import datasets

    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the package raises its own many kinds
        raise BadInput(f"hf-datasets cannot load {path}: {error}") from error
    parts: dict[str, Any] = (
        {str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}
    )
    if "train" not in parts:
        raise BadInput(f"{path} has the splits {some(parts)}; one named 'train' is needed")
    features: dict[str, Any] = dict(parts["train"].features)
    image = next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        kinds = ", ".join(f"{k}: {type(f).__name__}" for k, f in features.items())
        raise BadInput(
            f"{path} needs a column of type Image and one of type ClassLabel; it has {kinds}"
        )
    train = _hf_split(parts["train"], image, label)
    test_name = next((n for n in TEST_NAMES if n in parts), None)
    if test_name is None:
        train, test = divide(train, test=max(1, round(TEST_SHARE * len(train.labels))))
    else:
        test = _hf_split(parts[test_name], image, label)
    stored = sorted(
        p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "cache-"))
    )
    chunks = (c for p in stored for c in (os.fsencode(p.relative_to(path)), p))
    return Source(train, test, tuple(features[label].names), sha256(chunks), 224, 3)


def _hf_split(part: Any, image: str, label: str) -> Split:
    import datasets

    labels = torch.tensor(part[label][:])
    classes = len(part.features[label].names)
    if len(labels) and int(labels.min()) < 0:
        raise BadInput(
            "hf-datasets: some rows have no label (-1); drop them, or use a labelled split for the "
            "test"
        )
    if len(labels) and int(labels.max()) >= classes:
        raise BadInput(
            f"hf-datasets: some rows have the label {int(labels.max())}, but {classes} classes are "
            "named"
        )
    part = part.cast_column(image, datasets.Image(decode=False))
    return Split(Lazy(partial(_read_row, part, image), range(len(labels))), labels)


def _read_row(part: Any, image: str, row: int) -> Tensor:
    stored = part[row][image]
    data = (
        stored["bytes"]
        if stored["bytes"] is not None
        else files.read(stored["path"], "image", MOST_IMAGE)
    )
    return _decode(data, f"image of row {row} (hf-datasets)")


def synthetic(
    train: int, test: int, seed: int, img_size: int, in_chans: int, classes: int = 10
) -> Source:
    """Images drawn by seed: each class is a smooth pattern, shifted and dimmed, under another
    pattern and noise.

    The shift keeps a linear model from solving it; a small convolutional net gets most of it right.
    """
    rng = torch.Generator().manual_seed(seed)
    patterns = _smooth(classes, img_size, in_chans, rng)
    splits = []
    for count in (train, test):
        labels = torch.arange(count) % classes
        strength = 0.5 + torch.rand(count, 1, 1, 1, generator=rng)
        shift = torch.randint(0, img_size, (count, 2), generator=rng)
        x = torch.stack(
            [
                patterns[c].roll((int(dy), int(dx)), (-2, -1))
                for c, (dy, dx) in zip(labels, shift, strict=True)
            ]
        )
        x = (
            x * strength
            + 0.7 * _smooth(count, img_size, in_chans, rng)
            + 0.5 * torch.randn(x.shape, generator=rng)
        )
        splits.append(Split((x * 40 + 128).clamp(0, 255).to(torch.uint8), labels))
    names = tuple(f"class{i}" for i in range(classes))
    checksum = sha256(part.numpy().tobytes() for s in splits for part in (s.images, s.labels))
    return Source(splits[0], splits[1], names, checksum, img_size, in_chans)


def _smooth(count: int, img_size: int, in_chans: int, rng: torch.Generator) -> Tensor:
    coarse = torch.randn(count, in_chans, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(
        coarse, size=(img_size, img_size), mode="bilinear", align_corners=False
    )


def sha256(chunks: Iterable[bytes | Path]) -> str:
    """Return the hex digest over all chunks, or files in pieces, with each one's length so that
    their borders count."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(
            (len(chunk) if isinstance(chunk, bytes) else chunk.stat().st_size).to_bytes(8, "little")
        )
        if isinstance(chunk, bytes):
            digest.update(chunk)
            continue
        with chunk.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
