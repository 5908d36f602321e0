"""Your own images: a folder, with a sub-folder for each class."""

from __future__ import annotations

from pathlib import Path

import torch

from greenvis.data import images
from greenvis.data.dataset import DataSet
from greenvis.data.splits import Split, Stored, divide_by_share, sha256
from greenvis.errors import BadInput, some

TEST_NAMES = ("test", "val", "valid", "validation")


class Folder(DataSet):
    """One sub-folder for each class; `train/` with `test/` or `val/` where there are such, else a
    fifth of each class is the test."""

    name = "folder"
    argument = "PATH"
    source = "your own files"
    licence = "your own"

    def domain(self, name: str) -> DataSet | None:
        """Return the class folders of PATH/NAME."""
        path = self.resolve(self.value) / name
        if name in (".", "..") or Path(name).name != name or not path.is_dir():
            return None
        return Folder(self.spec.model_copy(update={"name": f"folder:{path}"}))

    def check(self) -> None:
        """Raise BadInput where there are no class folders."""
        _class_folders(_train_folder(self.resolve(self.value)))

    def read(self) -> Stored:
        """Return all images, still to be decoded."""
        path = self.resolve(self.value)
        test_folder = next((path / n for n in TEST_NAMES if (path / n).is_dir()), None)
        train_folder = _train_folder(path)
        if test_folder is not None and train_folder == path:
            raise BadInput(
                f"{path} has a folder '{test_folder.name}' but none named 'train' beside it"
            )
        paths, labels, classes = _class_files(train_folder)
        train = Split(images.lazy(paths), torch.tensor(labels))
        if test_folder is not None:
            test_paths, labels, _ = _class_files(test_folder, classes)
            test = Split(images.lazy(test_paths), torch.tensor(labels))
            paths = paths + test_paths
        else:
            train, test = divide_by_share(train)
        chunks = (c for f in paths for c in (str(f.relative_to(path)).encode(), f))
        return Stored(train, test, classes, sha256(chunks), 224, 3)


def _train_folder(path: Path) -> Path:
    return path / "train" if (path / "train").is_dir() else path


def _class_folders(path: Path) -> list[Path]:
    """Return the class folders under `path`, sorted. Raises BadInput where there are fewer than
    two."""
    if not path.is_dir():
        raise BadInput(f"no folder at {path}")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    images.check_names(folders)
    if len(folders) < 2:
        raise BadInput(
            f"{path} has {len(folders)} sub-folders; one for each class is needed, at least two"
        )
    return folders


def _class_files(
    path: Path, classes: tuple[str, ...] | None = None
) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Return the image files of all classes, their labels, and the classes' names."""
    folders = _class_folders(path)
    names = classes or tuple(f.name for f in folders)
    unknown = [f.name for f in folders if f.name not in names]
    if unknown:
        raise BadInput(f"{path} has classes that train has not: {some(unknown)}")
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        own = sorted(p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES)
        if not own:
            raise BadInput(f"no images in {folder}; looked for {some(sorted(images.SUFFIXES), 10)}")
        paths += own
        labels += [names.index(folder.name)] * len(own)
    return paths, labels, names
