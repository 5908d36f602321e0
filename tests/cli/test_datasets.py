"""`greenvis data`: what there is, what it looks like, and how it is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from greenvis.cli.main import main
from greenvis.data import DataSpec, dataset, sheets
from greenvis.data.sets import _emoji


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["data", "ls", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_data_set_is_listed_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    listed = rows(capsys)
    assert {name.partition(":")[0] for name in listed} == set(dataset.DOOR.names())
    assert all(row["licence"] and row["source"] and row["shows"] for row in listed.values())
    assert listed["digits"]["here"] == "yes"
    assert listed["digits"]["images"] == 1797
    assert listed["folder:PATH"]["here"] == "yours"
    assert listed["torchvision:NAME"]["here"] == "one of 30"
    assert listed["emoji:openmoji"]["licence"] == "CC-BY-SA-4.0"
    assert set(_emoji.STYLES) == {n.partition(":")[2] for n in listed if n.startswith("emoji:")}


def test_what_is_not_here_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("greenvis.data.sets.emoji.CACHE", tmp_path / "cache")
    listed = rows(capsys)
    assert listed["emoji:google"]["here"] == "no"
    assert "greenvis data fetch emoji:google" in listed["emoji:google"]["how"]
    assert listed["shapes:emoji-boxes"]["here"] == "no"
    assert listed["shapes:boxes"]["here"] == "yes"


def test_the_list_imports_no_torch() -> None:
    code = "import sys; from greenvis.cli.main import main; main(['data', 'ls', '--json']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", ["digits", "scenes", "shapes:boxes", "shapes:labels", "shapes:masks"]
)
def test_a_contact_sheet_is_a_png(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataset.find(
        DataSpec(
            name=name, train=None if name == "digits" else 20, test=5 if name != "digits" else None
        )
    )
    monkeypatch.setattr(dataset, "find", lambda spec, folder=".": few)
    out = tmp_path / "sheet.png"
    assert main(["data", "show", name, "--out", str(out), "--count", "10", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sheet"] == str(out)
    with Image.open(out) as image:
        assert image.size == (8 * sheets.TILE, 2 * (sheets.TILE + sheets.CAPTION))
        assert len(image.getcolors(2**20)) > 20


@pytest.mark.slow
def test_masks_and_boxes_are_drawn_where_they_are() -> None:
    spec = {"train": 6, "test": 2, "img_size": sheets.TILE}
    masks, boxes = (
        dataset.find(DataSpec(name=f"shapes:{kind}", **spec)).read() for kind in ("masks", "boxes")
    )
    colours = sheets.palette(len(masks.classes))
    for row in range(6):
        plain = masks.train.images[row]
        mask = masks.train.labels[row]
        tile = sheets._tile(plain, mask, "mask", colours)
        changed = [
            tile.getpixel((x, y)) != tuple(plain[:, y, x].tolist())
            for y in range(0, sheets.TILE, 3)
            for x in range(0, sheets.TILE, 3)
        ]
        inside = (mask[::3, ::3] > 0).flatten().tolist()
        assert sum(c != i for c, i in zip(changed, inside, strict=True)) < 0.02 * len(changed)
        target = boxes.train.labels[row]
        outlined = sheets._tile(plain, target, "box", colours)
        left, top, *_ = (int(v) for v in target["boxes"][-1].tolist())
        assert outlined.getpixel((left, top)) == tuple(colours[target["labels"][-1]].tolist())


def npm(folder: Path, script: str) -> dict[str, str]:
    """A program that is called as npm is; what it is asked for lies in `folder`/asked."""
    path = folder / "bin" / "npm"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho "$@" > "{folder}/asked"\n{script}\n')
    path.chmod(0o755)
    return {**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}"}


def test_emoji_are_fetched_by_npm_which_runs_no_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "emoji"
    packages = root / "node_modules"
    made = f'mkdir -p "{packages}/emoji-datasource-google"; echo "[]" > "{packages}/emoji-datasource-google/emoji.json"'
    monkeypatch.setenv("PATH", npm(tmp_path, made)["PATH"])
    assert main(["data", "fetch", "emoji:google", "--root", str(root)]) == 0
    assert str(root) in capsys.readouterr().out
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "install"
    assert "--ignore-scripts" in asked
    assert asked[-3:] == ["--prefix", str(root), "emoji-datasource-google"]


@pytest.mark.parametrize(
    ("words", "script", "message"),
    [
        (["fetch", "digits"], "", "'digits' is here: there is nothing to fetch"),
        (["fetch", "shapes:boxes"], "", "is here: there is nothing to fetch"),
        (["fetch", "emoji:gogle"], "", "did you mean 'google'"),
        (["fetch", "emoji:google"], "echo no network >&2; exit 1", "download failed (no network)"),
        (["show", "emoji:google"], "", "greenvis data fetch emoji:google"),
        (["show", "digits", "--part", "tset"], "", "--part is train or test"),
        (["shwo"], "", "did you mean 'show'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str],
    script: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", npm(tmp_path, script)["PATH"])
    monkeypatch.setattr("greenvis.data.sets.emoji.CACHE", tmp_path / "cache")
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_npm_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["data", "fetch", "emoji:noto", "--root", str(tmp_path)]) == 2
    assert "@iconify-json/noto of https://www.npmjs.com" in capsys.readouterr().err
