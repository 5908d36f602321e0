"""Data sets of the package `datasets` (Hugging Face) that lie in a local folder."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from greenvis.data.dataset import DataSet
from greenvis.data.sets.folder import TEST_NAMES
from greenvis.errors import BadInput, some

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.splits import Split, Stored


class HfDatasets(DataSet):
    """What `datasets` saved to disk, or a folder it can load (parquet, imagefolder)."""

    name = "hf-datasets"
    argument = "PATH"
    source = "a local folder"
    licence = "that of the data set: see its card"

    def check(self) -> None:
        """Raise BadInput where the local folder or the package `datasets` is missing."""
        if importlib.util.find_spec("datasets") is None:
            raise BadInput(
                "hf-datasets needs the package `datasets`: pip install 'greenvis[datasets]'"
            )
        path = self.resolve(self.value)
        if not path.is_dir():
            raise BadInput(
                f"hf-datasets: no folder at {path}; give a local folder (datasets on the Hub are "
                "not fetched)"
            )

    def read(self) -> Stored:
        """Return all images, still to be decoded."""
        from greenvis.data.splits import Stored, divide_by_share, sha256

        self.check()
        import datasets

        path = self.resolve(self.value)
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        try:
            loaded = (
                datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
            )
        except Exception as error:  # the package raises its own many kinds
            raise BadInput(f"hf-datasets cannot load {path}: {error}") from error
        parts: dict[str, Any] = (
            {str(k): v for k, v in loaded.items()}
            if isinstance(loaded, dict)
            else {"train": loaded}
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
        train = _split(parts["train"], image, label)
        test_name = next((n for n in TEST_NAMES if n in parts), None)
        if test_name is None:
            train, test = divide_by_share(train)
        else:
            test = _split(parts[test_name], image, label)
        stored = sorted(
            p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "cache-"))
        )
        chunks = (c for p in stored for c in (os.fsencode(p.relative_to(path)), p))
        return Stored(train, test, tuple(features[label].names), sha256(chunks), 224, 3)


def _split(part: Any, image: str, label: str) -> Split:
    import datasets
    import torch

    from greenvis.data.splits import Lazy, Split

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
    from greenvis.data import images

    stored = part[row][image]
    data = stored["bytes"]
    data = images.read(stored["path"]) if data is None else data
    return images.decode(data, f"image of row {row} (hf-datasets)")
