"""Your own images: a folder, with a sub-folder for each class, or with masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.data.sets import _masks
from greenvis.errors import BadInput, one_line, some

if TYPE_CHECKING:
    import torch

    from greenvis.data.splits import Split, Stored

TEST_NAMES = ("test", "val", "valid", "validation")
MOST_LINES = 30  # of what is wrong, in a message


class Folder(DataSet):
    """One sub-folder for each class; `train/` with `test/` or `val/` where there are such, else a
    fifth of each class is the test.

    With `images/` and `masks/` (or `img_dir` and `ann_dir`, `JPEGImages` and `SegmentationClass`),
    or NAME_mask.png beside each NAME, each pixel has a class: masks are of one channel, or of a
    palette, 255 is not known, `classes.txt` has one name per line; black and white ones are of two
    classes. `train` and `val` (or `test`) stand above or below these folders, or are left out.

    Hidden files and folders are passed over. All that is wrong is said at once; `skip_broken`
    leaves it out instead.
    """

    name = "folder"
    argument = "PATH"
    source = "your own files"
    licence = "your own"
    options = frozenset({"skip_broken"})

    def domain(self, name: str) -> DataSet | None:
        """Return the class folders of PATH/NAME."""
        path = self.resolve(self.value) / name
        if name in (".", "..") or Path(name).name != name or not path.is_dir():
            return None
        return Folder(self.spec.model_copy(update={"name": f"folder:{path}"}))

    def check(self) -> None:
        """Raise BadInput where there are neither class folders nor images with masks."""
        path = self.resolve(self.value)
        if not (path.is_dir() and _masks.found_in(path)):
            parts(path)

    def read(self) -> Stored:
        """Return all images, still to be decoded."""
        from greenvis.data.splits import Stored, divide_by_share, sha256

        path = self.resolve(self.value)
        if path.is_dir() and _masks.found_in(path):
            return self._with_masks(path)
        survey = look(path)
        if survey.problems and not self.spec.skip_broken:
            raise BadInput(refusal(path, survey.problems))
        survey.check_enough(path)
        train = _split(survey, "train")
        paths = [file for file, _ in (*survey.files["train"], *survey.files.get("test", []))]
        if "test" in survey.files:
            test = _split(survey, "test")
        else:
            train, test = divide_by_share(train)
        chunks = (c for f in paths for c in (str(f.relative_to(path)).encode(), f))
        skipped = tuple(survey.problems)
        return Stored(train, test, survey.classes, sha256(chunks), 224, 3, skipped=skipped)

    def _with_masks(self, path: Path) -> Stored:
        from greenvis.data.splits import Stored, divide_by_share, sha256

        survey = _masks.look(path)
        if survey.problems and not self.spec.skip_broken:
            raise BadInput(refusal(path, survey.problems))
        short = [part for part, pairs in survey.pairs.items() if not pairs]
        if short or len(survey.classes) < 2:
            raise BadInput(
                f"{path} has {len(survey.classes)} classes in masks that can be read"
                + (f", and no image with a mask in {some(short)}" if short else "")
            )
        train = survey.split("train")
        if "test" in survey.pairs:
            test = survey.split("test")
        else:
            train, test = divide_by_share(train)
        files = [f for pairs in survey.pairs.values() for pair in pairs for f in pair]
        chunks = (c for f in files for c in (str(f.relative_to(path)).encode(), f))
        digest = sha256(chunks)
        return Stored(train, test, survey.classes, digest, 224, 3, skipped=tuple(survey.problems))


def refusal(path: Path, problems: Sequence[str]) -> str:
    """Return all that is wrong, and what to do about it."""
    lines = [f"- {one_line(problem)}" for problem in problems[:MOST_LINES]]
    if len(problems) > MOST_LINES:
        lines.append(f"- … (+{len(problems) - MOST_LINES})")
    return "\n".join([
        f"folder:{path} cannot be used as it is:",
        *lines,
        "mend these or take them out, or set `skip_broken: true` in the recipe's `data`, which "
        "leaves them out",
    ])  # fmt: skip


@dataclass
class Survey:
    """What a folder holds, and all that is wrong with it.

    Args:
        classes: Names of those that have training images, by label.
        files: Image files that can be shown, with their labels, by part: "train", and "test" where
            there is such a folder.
        problems: What keeps the folder from being used as it is, a line each.
        notes: What is passed over, a line each.
    """

    classes: tuple[str, ...] = ()
    files: dict[str, list[tuple[Path, int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check_enough(self, path: Path) -> None:
        """Raise BadInput where fewer than two classes, or no test image, can be shown."""
        if len(self.classes) < 2 or not self.files.get("test", [True]):
            raise BadInput(
                f"{path} has {len(self.classes)} classes with images that can be read"
                + ("" if len(self.classes) < 2 else ", and none to test")
            )


def parts(path: Path) -> dict[str, list[Path]]:
    """Return the class folders below a folder, by part: "train", and "test" where there are such.

    Raises:
        BadInput: Where there are fewer than two, or a test without a folder named "train".
    """
    from greenvis.data import images

    test = next((path / n for n in TEST_NAMES if (path / n).is_dir()), None)
    train = path / "train" if (path / "train").is_dir() else path
    if test is not None and train == path:
        raise BadInput(f"{path} has a folder '{test.name}' but none named 'train' beside it")
    out = {"train": _class_folders(train)}
    if len(out["train"]) < 2:
        loose = sum(p.suffix.lower() in images.SUFFIXES for p in train.iterdir())
        beside = f" ({loose} images lie beside them)" if loose else ""
        raise BadInput(
            f"{train} has {len(out['train'])} sub-folders{beside}; one for each class is needed, "
            "at least two"
        )
    return out if test is None else {**out, "test": _class_folders(test)}


def look(path: Path) -> Survey:
    """Look at all of a folder: names, class folders and every image file.

    Args:
        path: The folder that holds the class folders, or `train` and `test`.

    Returns:
        What it holds, and all that is wrong with it.

    Raises:
        BadInput: As `parts` does.
    """
    from greenvis.data import images

    survey, folders = Survey(), parts(path)
    files = {part: [(f, images.below(f)) for f in of_part] for part, of_part in folders.items()}
    _note_passed_over(survey, path, folders["train"][0].parent, files)
    every = [file for of_part in files.values() for _, own in of_part for file in own]
    broken = images.scan(every)
    survey.problems += [
        f"cannot read the image {f.relative_to(path)}: {why}" for f, why in broken.items()
    ]
    readable = {
        part: [(f.name, [file for file in own if file not in broken]) for f, own in of_part]
        for part, of_part in files.items()
    }
    for part, of_part in files.items():
        for folder, own in of_part:
            if not own:
                looked_for = some(sorted(images.SUFFIXES), 10)
                survey.problems.append(f"no images in {folder}; looked for {looked_for}")
            elif part == "train" and not set(own) - broken.keys():
                survey.problems.append(f"no image in {folder} can be read")
    survey.classes = tuple(name for name, own in readable["train"] if own)
    for name, own in readable.get("test", []):
        if own and name not in survey.classes:
            survey.problems.append(f"test class '{name}' has no training images")
    for part, of_part in readable.items():
        survey.files[part] = [
            (file, survey.classes.index(name))
            for name, own in of_part
            if name in survey.classes
            for file in own
        ]
    return survey


def _note_passed_over(
    survey: Survey, path: Path, train: Path, files: dict[str, list[tuple[Path, list[Path]]]]
) -> None:
    """Note what lies among the images and is none, and images that lie in no class."""
    from greenvis.data import images

    images_of = {file for of_part in files.values() for _, own in of_part for file in own}
    others = [
        str(f.relative_to(path))
        for of_part in files.values()
        for folder, _ in of_part
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f not in images_of and not images.is_hidden(f.relative_to(folder))
    ]
    loose = [
        p.name
        for p in sorted(train.iterdir())
        if p.suffix.lower() in images.SUFFIXES and p.is_file() and not p.name.startswith(".")
    ]
    for names, what in ((others, "no images, passed over"), (loose, "in no class, passed over")):
        if names:
            survey.notes.append(f"{len(names)} {what}: {some(names)}")


def _class_folders(path: Path) -> list[Path]:
    from greenvis.data import images

    if not path.is_dir():
        raise BadInput(f"no folder at {path}")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not images.is_hidden(Path(p.name)))
    images.check_names(folders)
    return folders


def _split(survey: Survey, part: str) -> Split:
    from greenvis.data import images
    from greenvis.data.splits import Split

    paths = [path for path, _ in survey.files[part]]
    return Split(images.lazy(paths), _numbers(label for _, label in survey.files[part]))


def _numbers(labels: Iterable[int]) -> torch.Tensor:
    import torch

    return torch.tensor(list(labels), dtype=torch.int64)
