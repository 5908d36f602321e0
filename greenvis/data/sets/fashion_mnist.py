"""Fashion-MNIST, read from its four IDX files, packed or not: Debian has a package of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data import downloads
from greenvis.data.dataset import DataSet
from greenvis.data.downloads import DOWNLOADS, fetching
from greenvis.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    from greenvis.data.splits import Stored

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 64 * 2**20  # of a file, unpacked: the largest has 47 million
PARTS = ("train", "t10k")


class FashionMnist(DataSet):
    """28x28 grey pictures of clothes (Xiao et al., 2017)."""

    name = "fashion-mnist"
    source = "https://github.com/zalandoresearch/fashion-mnist"
    licence = "MIT"
    checksum = "cb991ffa68f04198396170795f7d73772182465a45140610f6c6b6fa98745470"
    size = {"train": 60_000, "test": 10_000}
    classes = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    )  # fmt: skip
    options = frozenset({"root", "download"})

    def check(self) -> None:
        """Raise BadInput where the files are not here and are not to be fetched."""
        if not self.spec.download:
            self._files_folder()

    def fetch(self) -> Path:
        """Fetch the four files."""
        self._download()
        return self._files_folder()

    def read(self) -> Stored:
        """Return all images; fetches them where they are missing and `download` is set."""
        import torch

        from greenvis.data.splits import Split, Stored, sha256

        try:
            folder = self._files_folder()
        except BadInput:
            if not self.spec.download:
                raise
            self._download()
            folder = self._files_folder()
        arrays = [_read_idx(folder, part, kind) for part in PARTS for kind in ("images", "labels")]
        splits = []
        for images, labels in (arrays[:2], arrays[2:]):
            if len(images) != len(labels) or not len(labels) or labels.max() >= len(self.classes):
                raise BadInput(
                    f"{folder}: {len(images)} images and {len(labels)} labels of "
                    f"{len(self.classes)} classes do not go together"
                )
            splits.append(Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
        digest = sha256(array.tobytes() for array in arrays)
        return Stored(splits[0], splits[1], self.classes, digest, 28, 1)

    def _files_folder(self) -> Path:
        """Return the folder that holds the files. Raises BadInput with the ways to get them."""
        raw = Path("FashionMNIST") / "raw"
        candidates = [self.root, self.root / raw] if self.root else [DEBIAN, DOWNLOADS / raw]
        for folder in candidates:
            if all(
                _idx_path(folder, part, kind) for part in PARTS for kind in ("images", "labels")
            ):
                return folder
        raise BadInput(
            f"fashion-mnist: its four IDX files are not in {' or '.join(map(str, candidates))}; "
            "get them with `apt-get install dataset-fashion-mnist`, name their folder with `root`, "
            "or set `download: true`"
        )

    def _download(self) -> None:
        from torchvision.datasets import FashionMNIST

        with fetching("fashion-mnist", "try `apt-get install dataset-fashion-mnist`"):
            FashionMNIST(str(self.root or DOWNLOADS), download=True)


def _idx_path(folder: Path, part: str, kind: str) -> Path | None:
    stem = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)


def _read_idx(folder: Path, part: str, kind: str) -> np.ndarray:
    """Read one IDX file: a magic number (0x08 = uint8, then the number of axes), the axes' lengths,
    the bytes.

    torchvision's reader takes neither packed files nor a bound on what they unpack to.
    """
    import numpy as np

    path = _idx_path(folder, part, kind)
    assert path is not None  # _files_folder saw it
    raw = downloads.read(path, f"IDX file of {kind}", MOST_BYTES)
    axes = 3 if kind == "images" else 1
    head = np.frombuffer(raw, ">u4", count=min(axes + 1, len(raw) // 4))
    shape = tuple(int(n) for n in head[1:])
    if not len(head) or head[0] != 0x0800 + axes or len(raw) != 4 * (axes + 1) + math.prod(shape):
        raise BadInput(f"{path} is not a whole IDX file of {kind}; get the file anew")
    return np.frombuffer(raw, np.uint8, offset=4 * (axes + 1)).reshape(shape).copy()
