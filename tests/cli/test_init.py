"""`greenvis init`: from one's own images to a recipe that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from greenvis import data
from greenvis.cli.main import main
from greenvis.experiment.recipe import load_recipe

MODEL = ["--model", "plain/mlp", "--goal", "train"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two classes with a broken file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        target = tmp_path / "meine Bilder" / ("chien", "δελφίνι")[number % 2]
        target.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 24, 3), 40 + 170 * (number % 2), np.uint8)
        pixels[: number % 7] = 0
        Image.fromarray(pixels).save(target / f"{number}.jpg")
    (tmp_path / "meine Bilder" / "chien" / "bad.jpg").write_text("no image")
    return tmp_path


def test_a_folder_trains_after_one_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--images", "meine Bilder", "--out", "my.yaml", *MODEL]) == 0
    out = capsys.readouterr().out
    assert "- cannot read the image chien/bad.jpg: no image of a known format" in out
    assert "19 images to train on, 5 to test, 2 classes" in out
    text = (folder / "my.yaml").read_text()
    assert "# left out: cannot read the image chien/bad.jpg" in text
    quick = ["train.epochs=1", "train.seeds=[0]", "meter={codecarbon: false}", "data.img_size=8"]
    small = "model={ref: plain/mlp, img_size: 8, hidden: [4]}"
    sets = [word for value in (*quick, small) for word in ("--set", value)]
    assert main(["run", "my.yaml", *sets, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results["arms"]) == 2
    records = [path.read_text() for path in (folder / "runs").rglob("*.jsonl")]
    assert len(records) == 2
    assert all("cannot read the image chien/bad.jpg" in text for text in records)


@pytest.mark.parametrize("goal", ["adapt", "train"])
def test_what_is_whole_is_left_as_it_is(goal: str, folder: Path) -> None:
    (folder / "meine Bilder" / "chien" / "bad.jpg").unlink()
    assert main(["init", "--images", "meine Bilder", "--out", "sub/my.yaml", "--goal", goal]) == 0
    recipe = load_recipe(folder / "sub" / "my.yaml")
    assert not recipe.data.skip_broken
    assert recipe.baseline == "full"
    assert len(recipe.arms) >= 2
    assert data.load(recipe.data, recipe.folder).classes == ("chien", "δελφίνι")
    assert all(recipe.arm(name).techniques is not None for name in recipe.arms)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (("label", ["a", "b"]), "classification"),
        (("red,round", ["0,1", "1,1"]), "multilabel"),
        (("age", ["3", "4.5"]), "regression"),
    ],
)
def test_a_table_says_its_task(columns: tuple[str, list[str]], task: str, folder: Path) -> None:
    header, labels = columns
    paths = sorted((folder / "meine Bilder").rglob("[0-9]*.jpg"))
    rows = [f"{p.relative_to(folder)},{labels[i % 2]}" for i, p in enumerate(paths)]
    (folder / "mine.csv").write_text("\n".join([f"path,{header}", *rows]))
    assert main(["init", "--images", "mine.csv", "--out", "my.yaml"]) == 0
    recipe = load_recipe(folder / "my.yaml")
    assert recipe.data.name == "csv:mine.csv"
    assert recipe.task == task


def test_it_asks_where_a_terminal_can_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["digits", "plain/mlp", "train"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert main(["init"]) == 0
    recipe = load_recipe(folder / "recipe.yaml")
    assert (recipe.data.name, recipe.model.ref) == ("digits", "plain/mlp")
    assert next(answers, None) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name your images: greenvis init --images FOLDER"),
        (["--images", "meine Bidler"], "no folder, table or data set 'meine Bidler'"),
        (["--images", "meine Bilder/chien"], "has 0 sub-folders (13 images lie beside them)"),
        (["--images", "digits", "--goal", "adopt"], "did you mean 'adapt'"),
        (["--images", "digits", "--out", "meine Bilder"], "is there already"),
    ],
)
def test_bad_input_writes_nothing(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before: list[Any] = sorted(folder.rglob("*"))
    assert main(["init", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder / "meine Bilder")
