"""Your own images, named by a table: a column of paths, and columns of labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenvis.core import files
from greenvis.data.dataset import DataSet
from greenvis.errors import BadInput, one_line, some

if TYPE_CHECKING:
    from torch import Tensor

    from greenvis.data.splits import Split, Stored

PATH_NAMES = ("path", "file", "filename", "image", "image_path")
SPLIT_NAMES = ("split", "part", "subset")
CLASS_NAMES = ("label", "class", "category", "target")  # of these, numbers are names
PARTS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
MOST_BYTES = 256 * 2**20
MOST_LINES = 30  # of what is wrong, in a message


class Csv(DataSet):
    """Your own images, named by a table with columns of labels.

    It has a row for each image: a column `path` (or `file`, `filename`, `image`), relative to the
    table, and columns of labels; a column `split` of train and test, else a fifth is the test (of
    images whose labels are all known).

    One column of words is the class, and so is one named `label` or `class`; several columns of 0
    and 1 are several labels; other columns of numbers are numbers to predict. An empty cell is not
    known. Comma, semicolon or tab; the first line names the columns.
    """

    name = "csv"
    argument = "PATH"
    source = "your own files"
    licence = "your own"
    options = frozenset({"skip_broken"})

    def check(self) -> None:
        """Raise BadInput where there is no table."""
        _table(self.resolve(self.value))

    def read(self) -> Stored:
        """Return all images, still to be decoded."""
        from greenvis.data import images
        from greenvis.data.splits import Split, Stored, sha256

        table = self.resolve(self.value)
        rows, columns = _rows(table)
        problems = [f"line {row.line}: {row.problem}" for row in rows if row.problem]
        rows = [row for row in rows if not row.problem]
        broken = images.scan([row.path for row in rows])
        problems += [
            f"line {r.line}: cannot read the image {r.cells[0]}: {broken[r.path]}"
            for r in rows
            if r.path in broken
        ]
        if problems and not self.spec.skip_broken:
            raise BadInput(_refusal(table, problems))
        rows = [row for row in rows if row.path not in broken]
        labels, classes = _labels(table, rows, columns)
        split = Split(images.lazy([row.path for row in rows]), labels)
        train, test = _divide(table, split, rows)
        chunks = [c for row in rows for c in ("\0".join(row.cells).encode(), row.path)]
        digest = sha256([*chunks, labels.numpy().tobytes()])
        return Stored(train, test, classes, digest, 224, 3, skipped=tuple(problems))


@dataclass
class _Row:
    """A line of the table. cells: the path, then the labels. part: "train", "test" or ""."""

    line: int
    path: Path
    cells: list[str]
    part: str
    problem: str = ""


def _refusal(table: Path, problems: list[str]) -> str:
    lines = [f"- {one_line(problem)}" for problem in problems[:MOST_LINES]]
    if len(problems) > MOST_LINES:
        lines.append(f"- … (+{len(problems) - MOST_LINES})")
    return "\n".join([
        f"csv:{table} cannot be used as it is:",
        *lines,
        "mend these lines or take them out, or set `skip_broken: true` in the recipe's `data`, "
        "which leaves them out",
    ])  # fmt: skip


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """Return the lines that are not empty, with their numbers, as cells."""
    raw = files.read(path, "table", MOST_BYTES)
    try:
        text = raw.decode("utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except csv.Error as error:
        raise BadInput(f"{path} is no table: {error}") from error
    if len(lines) < 2:
        raise BadInput(f"{path} has {len(lines)} lines; one of names, then one for each image")
    return lines


def _rows(table: Path) -> tuple[list[_Row], list[str]]:
    """Return the rows, each with what is wrong with it, and the names of the label columns."""
    (_, names), *lines = _table(table)
    lowered = [name.lower() for name in names]
    path_at = next((lowered.index(n) for n in PATH_NAMES if n in lowered), None)
    part_at = next((lowered.index(n) for n in SPLIT_NAMES if n in lowered), None)
    label_at = [i for i in range(len(names)) if i not in (path_at, part_at)]
    if path_at is None or not label_at or len(set(lowered)) < len(names) or "" in names:
        raise BadInput(
            f"{table}, line 1: columns are {some(names, 12)}; one named {some(PATH_NAMES)} and at "
            "least one of labels are needed, each with a name of its own"
        )
    rows: list[_Row] = []
    first: dict[Path, int] = {}
    for line, cells in lines:
        if len(cells) != len(names):
            problem = f"{len(cells)} cells, and the first line names {len(names)}"
            rows.append(_Row(line, table, cells, "", problem))
            continue
        path = table.parent / cells[path_at]
        part = "" if part_at is None else PARTS.get(cells[part_at].lower(), cells[part_at])
        row = _Row(line, path, [cells[path_at], *(cells[i] for i in label_at)], part)
        if not cells[path_at] or not path.exists():
            row.problem = f"no file '{cells[path_at]}'"
        elif path in first:
            row.problem = f"'{cells[path_at]}' stands in line {first[path]} already"
        elif part_at is not None and part not in PARTS:
            row.problem = f"split '{part}' is neither train nor test"
        first.setdefault(path, line)
        rows.append(row)
    return rows, [names[i] for i in label_at]


def _labels(table: Path, rows: list[_Row], columns: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the labels of a kind that the columns show, and the names of classes or numbers."""
    import torch

    cells = [row.cells[1:] for row in rows]
    shown = {cell for row in cells for cell in row} - {""}
    if not shown:
        raise BadInput(f"{table} has no image with a label that can be read")
    single = len(columns) == 1
    if single and (columns[0].lower() in CLASS_NAMES or not all(map(_is_number, shown))):
        classes = tuple(sorted(shown, key=lambda c: (float(c) if _is_number(c) else 0.0, c)))
        if len(classes) < 2:
            raise BadInput(f"{table}: column '{columns[0]}' has one class, {some(classes)}")
        return torch.tensor([classes.index(c) if c else -1 for (c,) in cells]), classes
    if not single and shown <= {"0", "1"}:
        values = _each(rows, lambda cell: int(cell) if cell else -1)
        return torch.tensor(values, dtype=torch.int8), tuple(columns)
    odd = [
        f"line {row.line}: '{cell}' in column '{name}' is no number"
        for row in rows
        for name, cell in zip(columns, row.cells[1:], strict=True)
        if cell and not _is_number(cell)
    ]
    if odd:
        raise BadInput(
            f"{table} has several columns of labels ({some(columns)}), which are to be 0 and 1, or "
            f"numbers: {'; '.join(odd[:5])}; name one column of words alone"
        )
    values = _each(rows, lambda cell: float(cell) if cell else float("nan"))
    return torch.tensor(values, dtype=torch.float32), tuple(columns)


def _each(rows: list[_Row], value: Callable[[str], Any]) -> list[list[Any]]:
    return [[value(cell) for cell in row.cells[1:]] for row in rows]


def _is_number(cell: str) -> bool:
    try:
        return float(cell) - float(cell) == 0  # neither nan nor infinite
    except ValueError:
        return False


def _divide(table: Path, split: Split, rows: list[_Row]) -> tuple[Split, Split]:
    """Return train and test, as the table says, else a fifth as the test."""
    import torch

    from greenvis.data.splits import UNKNOWN, Split, divide_by_share

    full = torch.tensor([all(row.cells) for row in rows])  # of others no answer can be judged
    if any(row.part for row in rows):
        tests = torch.tensor([row.part == "test" for row in rows])
        numbers = [which.nonzero().squeeze(1) for which in (~tests, tests & full)]
    else:
        groups = split.groups.masked_fill(~full, UNKNOWN)
        numbers = [p.images for p in divide_by_share(Split(torch.arange(len(rows)), groups))]
    if not all(map(len, numbers)):
        counts = " and ".join(str(len(n)) for n in numbers)
        raise BadInput(f"{table}: {counts} images to train and to test; both are needed")
    return split.take(numbers[0]), split.take(numbers[1])  # type: ignore[arg-type]
