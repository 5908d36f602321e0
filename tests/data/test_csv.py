"""A table of images: the kind of its labels, and its errors by line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from greenvis import data
from greenvis.data import DataSpec, dataset
from greenvis.data.sets.csv import Csv
from greenvis.errors import BadInput
from greenvis.testing import check_dataset


def table(folder: Path, header: str, *labels: str, sep: str = ",") -> DataSpec:
    """Write a table with an image for each row of labels."""
    (folder / "pictures").mkdir(exist_ok=True)
    lines = [header]
    for number, label in enumerate(labels):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        lines.append(f"pictures/{number}.png{sep}{label}")
    (folder / "mine.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return DataSpec(name="csv:mine.csv", img_size=8)


@pytest.mark.parametrize(
    ("header", "labels", "kind", "classes"),
    [
        ("path,kind", ("dog", "cat") * 6, "class", ("cat", "dog")),
        ("file;label", ("10", "2", "") * 5, "class", ("2", "10")),
        ("image\tred\tround", ("0\t1", "1\t1", "1\t") * 4, "multilabel", ("red", "round")),
        ("path,x,y", ("0.5,1", "-2,7", "1e3,") * 4, "number", ("x", "y")),
        ("path,age", ("31", "47") * 6, "number", ("age",)),
    ],
    ids=["words", "numbers that are names", "several labels", "numbers", "a number"],
)
def test_columns_say_of_which_kind_labels_are(
    header: str, labels: tuple[str, ...], kind: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    sep = next(c for c in ",;\t" if c in header)
    spec = table(tmp_path, header, *labels, sep=sep)
    result = check_dataset(Csv, spec, tmp_path)
    assert result.outcome == "works", result
    stored = dataset.find(spec, tmp_path).read()
    assert (stored.train.kind, stored.classes) == (kind, classes)
    every = torch.cat([stored.train.labels, stored.test.labels])
    unknown = int((every.isnan() if kind == "number" else every == -1).sum())
    assert unknown == sum(cell == "" for label in labels for cell in label.split(sep))
    assert stored.test.known.all()


def test_a_column_divides(tmp_path: Path) -> None:
    labels = [f"{'cat' if i % 2 else 'dog'},{'val' if i > 8 else 'train'}" for i in range(12)]
    mine = data.load(table(tmp_path, "path,kind,split", *labels), tmp_path)
    assert (len(mine.train), len(mine.test)) == (9, 3)
    x, y = mine.test.batch([0, 1, 2])
    assert y.tolist() == [0, 1, 0]
    assert x.shape == (3, 3, 8, 8)


def test_all_that_is_wrong_is_said_at_once_by_line(tmp_path: Path) -> None:
    spec = table(tmp_path, "path,kind", *("dog", "cat") * 6)
    (tmp_path / "pictures" / "3.png").write_text("no image")
    with (tmp_path / "mine.csv").open("a") as file:
        file.write("pictures/none.png,dog\n\npictures/0.png,cat\npictures/1.png,cat,x\n,dog\n")
    with pytest.raises(BadInput) as caught:
        data.load(spec, tmp_path)
    assert str(caught.value).splitlines()[1:-1] == [
        "- line 14: no file 'pictures/none.png'",
        "- line 16: 'pictures/0.png' stands in line 2 already",
        "- line 17: 3 cells, and the first line names 2",
        "- line 18: no file ''",
        "- line 5: cannot read the image pictures/3.png: no image of a known format",
    ]
    kept = data.load(spec.model_copy(update={"skip_broken": True}), tmp_path)
    assert len(kept.train) + len(kept.test) == 11
    assert len(kept.facts()["skipped"]) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 lines"),
        ("path,kind\n", "has 1 lines"),
        ("x,y\n1,2\n", "line 1: columns are 'x', 'y'; one named 'path'"),
        ("path\na.png\n", "at least one of labels"),
        ("path,kind,kind\na.png,1,2\n", "a name of its own"),
        ("path,kind\npictures/0.png,dog\n", "has one class, 'dog'"),
        ("path,kind\npictures/0.png,\n", "no image with a label"),
        ("path,a,b\npictures/0.png,dog,1\n", "line 2: 'dog' in column 'a' is no number"),
        ("path,kind,split\npictures/0.png,dog,tset\n", "split 'tset' is neither train nor test"),
    ],
)
def test_what_is_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    spec = table(tmp_path, "path,kind", "dog")
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(BadInput, match=message):
        data.load(spec, tmp_path)


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(b"path,kind\n\xff.png,dog\n")
    with pytest.raises(BadInput, match="not UTF-8 at byte 10"):
        data.check(DataSpec(name="csv:mine.csv"), tmp_path)
    with pytest.raises(BadInput, match=r"cannot read the table .*none\.csv"):
        data.check(DataSpec(name="csv:none.csv"), tmp_path)
