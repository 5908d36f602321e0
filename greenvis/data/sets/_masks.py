"""Your own images with masks: a folder of each, or a mask beside its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenvis.core import files
from greenvis.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.splits import Split

IMAGES = ("images", "img_dir", "JPEGImages", "imgs")  # folders of images, in the order looked for
MASKS = ("masks", "ann_dir", "SegmentationClass", "annotations", "labels")  # and of their masks
TRAIN, TEST = ("train", "training"), ("test", "val", "valid", "validation")
SUFFIX = "_mask"  # of a mask beside its image: NAME_mask.png
NAMES_FILE = "classes.txt"  # a class a line, from 0 on
NOTHING = 255  # a pixel that nobody has labelled, as Pascal VOC has it
MOST_NAMES = 2**20  # bytes


@dataclass
class Masks:
    """What a folder of images and masks holds, and all that is wrong with it.

    Args:
        classes: Names, by number.
        pairs: Images and their masks, by part: "train", and "test" where there is such a folder.
        binary: Whether masks are black and white: 255 is the second of two classes.
        problems: What keeps the folder from being used as it is, a line each.
        notes: What is passed over, a line each.
    """

    classes: tuple[str, ...] = ()
    pairs: dict[str, list[tuple[Path, Path]]] = field(default_factory=dict)
    binary: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def split(self, part: str) -> Split:
        """Return images and masks of a part, still to be decoded."""
        from greenvis.data import images
        from greenvis.data.splits import Split

        paths = [mask for _, mask in self.pairs[part]]
        number = {255: 1} if self.binary else {NOTHING: -1}
        return Split(
            images.lazy([image for image, _ in self.pairs[part]]), lazy_masks(paths, number)
        )


def lazy_masks(paths: Sequence[Path], numbers: Mapping[int, int]) -> Any:
    """Return the masks of files, unread: integers (height, width).

    Args:
        paths: Of images of one channel, or of a palette.
        numbers: Class, or -1, by value of a pixel; others are what they say.
    """
    from greenvis.data.splits import Lazy

    return Lazy(partial(_read_mask, paths, dict(numbers)), range(len(paths)))


def _read_mask(paths: Sequence[Path], numbers: Mapping[int, int], row: int) -> Tensor:
    import torch

    from greenvis.data import images

    mask = images.decode_mask(images.read(paths[row]), f"mask {paths[row]}")
    table = torch.arange(256, dtype=torch.int16)
    for value, number in numbers.items():
        table[value] = number
    return table[mask.long()]


def found_in(path: Path) -> bool:
    """Return whether a folder holds images with masks: by its folders' names, or by the masks'."""
    return bool(_folders(path)) or any(
        _folders(path / name) or _beside(path / name) for name in (*TRAIN, *TEST, "")
    )


def look(path: Path) -> Masks:
    """Look at all of a folder: which image has which mask, and every file.

    Args:
        path: It holds `images` and `masks`, each with or without `train` and `val` (or `test`); or
            these two with `images` and `masks` in each; or NAME_mask.png beside each NAME.

    Returns:
        What it holds, and all that is wrong with it.
    """
    from greenvis.data import images

    survey = Masks()
    for part, names in (("train", TRAIN), ("test", TEST)):
        pairs = _part(path, names, survey)
        if pairs is not None:
            survey.pairs[part] = pairs
    every = [file for pairs in survey.pairs.values() for pair in pairs for file in pair]
    broken = images.scan(every)
    survey.problems += [f"cannot read {f.relative_to(path)}: {why}" for f, why in broken.items()]
    values: set[int] = set()
    for part, pairs in survey.pairs.items():
        good = []
        for image, mask in pairs:
            if image in broken or mask in broken:
                continue
            problem = _check_pair(image, mask, values)
            if problem:
                survey.problems.append(f"{mask.relative_to(path)}: {problem}")
            else:
                good.append((image, mask))
        survey.pairs[part] = good
    _name_classes(path, survey, values)
    return survey


def _name_classes(path: Path, survey: Masks, values: set[int]) -> None:
    survey.binary = values == {0, 255}
    count = 2 if survey.binary else max(values - {NOTHING}, default=0) + 1
    names = [str(number) for number in range(count)]
    if (path / NAMES_FILE).is_file():
        raw = files.read(path / NAMES_FILE, "list of classes", MOST_NAMES)
        text = raw.decode("utf-8", "replace")
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if len(names) < count:
            survey.problems.append(
                f"{NAMES_FILE} names {len(names)} classes, and masks have {count}, "
                f"up to {count - 1}"
            )
    elif survey.binary:
        names = ["background", "foreground"]
    survey.classes = tuple(names)


def _check_pair(image: Path, mask: Path, values: set[int]) -> str:
    """Note the values of a mask, and return what is wrong with it."""
    from greenvis.data import images

    try:
        pixels = images.decode_mask(images.read(mask), "mask")
        shape = images.size_of(images.read(image), "image")
    except BadInput as error:
        return str(error).partition(": ")[2] or str(error)
    values.update(pixels.unique().tolist())
    if tuple(pixels.shape) != shape:
        high, wide = pixels.shape
        return f"{wide}×{high} pixels, and its image has {shape[1]}×{shape[0]}"
    return ""


def _folders(path: Path) -> tuple[Path, Path] | None:
    """Return the folder of images and that of masks, where there are both."""
    images = next((path / name for name in IMAGES if (path / name).is_dir()), None)
    masks = next((path / name for name in MASKS if (path / name).is_dir()), None)
    return None if images is None or masks is None else (images, masks)


def _beside(path: Path) -> list[Path]:
    """Return the masks that lie beside their images."""
    from greenvis.data import images

    if not path.is_dir():
        return []
    own = (p for p in path.iterdir() if p.stem.endswith(SUFFIX))
    return sorted(p for p in own if p.suffix.lower() in images.SUFFIXES and p.name[0] != ".")


def _part(path: Path, names: Sequence[str], survey: Masks) -> list[tuple[Path, Path]] | None:
    """Return the pairs of a part; None where there is no folder of it."""
    both = _folders(path)
    for name in names:
        if both is not None and (both[0] / name).is_dir():
            return _matched(both[0] / name, both[1] / name, path, survey)
        inner = _folders(path / name)
        if inner is not None:
            return _matched(*inner, path, survey)
        if _beside(path / name):
            return _matched_beside(path / name, path, survey)
    if names is TEST:
        return None
    if both is not None:
        return _matched(*both, path, survey)
    if _beside(path):
        return _matched_beside(path, path, survey)
    raise BadInput(
        f"{path} has a test and nothing to train on: put the images to train on and their masks "
        f"into {path.name}/{names[0]}"
    )


def _matched(images: Path, masks: Path, path: Path, survey: Masks) -> list[tuple[Path, Path]]:
    """Match by relative path without suffix; a mask may be called as its image and `_mask`."""
    from greenvis.data import images as decoder

    if not masks.is_dir():
        raise BadInput(f"{images} has no folder of masks at {masks}")
    by_name: dict[str, Path] = {}
    for mask in decoder.below(masks):
        key = str(mask.relative_to(masks).with_suffix(""))
        by_name[key.removesuffix(SUFFIX)] = mask
    pairs = []
    for image in decoder.below(images):
        key = str(image.relative_to(images).with_suffix(""))
        if key in by_name:
            pairs.append((image, by_name.pop(key)))
        else:
            near = nearest(key, by_name) if by_name else ""
            survey.problems.append(f"no mask of {image.relative_to(path)}{near}")
    survey.problems += [f"no image of {m.relative_to(path)}" for m in by_name.values()]
    return pairs


def _matched_beside(folder: Path, path: Path, survey: Masks) -> list[tuple[Path, Path]]:
    from greenvis.data import images

    masks = {mask.stem.removesuffix(SUFFIX): mask for mask in _beside(folder)}
    pairs = []
    for image in sorted(folder.iterdir()):
        own = image.suffix.lower() in images.SUFFIXES and not images.is_hidden(Path(image.name))
        if not own or image.stem.endswith(SUFFIX):
            continue
        if image.stem in masks:
            pairs.append((image, masks.pop(image.stem)))
        else:
            survey.problems.append(f"no mask of {image.relative_to(path)}")
    survey.problems += [f"no image of {m.relative_to(path)}" for m in masks.values()]
    return pairs
