"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet, find

if TYPE_CHECKING:
    import numpy as np

    from greenvis.data.splits import Stored


class Digits(DataSet):
    """8x8 handwritten digits, embedded in scikit-learn (Alpaydin and Kaynak, 1998)."""

    name = "digits"
    source = "https://archive.ics.uci.edu/dataset/80"
    licence = "CC-BY-4.0"
    checksum = "691f06548c7e4efa4d55907be1d0562cab6c310a3c6bbe42443f01e698d461c5"
    size = {"train": 1347, "test": 450}
    classes = tuple("0123456789")

    def domain(self, name: str) -> DataSet | None:
        """Return the digits of mnist-5k, as another domain."""
        spec = self.spec.model_copy(update={"name": name, "root": None})
        return find(spec, self.folder) if name == "mnist-5k" else None

    def read(self) -> Stored:
        """Return all of them, a quarter of each class as the test."""
        import numpy as np
        import torch

        from greenvis.data.splits import Split, Stored, divide, sha256

        rows = _rows()
        pixels = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = rows[:, -1].astype(np.int64)
        images = Split(torch.from_numpy(pixels), torch.from_numpy(labels))
        train, test = divide(images, test=self.size["test"])
        return Stored(train, test, self.classes, sha256([pixels.tobytes(), labels.tobytes()]), 8, 1)


@cache
def _rows() -> np.ndarray:
    """Return 64 values of 0 to 16 and the digit, by image; importing scikit-learn would take
    seconds, and of it this is one file."""
    import numpy as np

    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(file, delimiter=",")
