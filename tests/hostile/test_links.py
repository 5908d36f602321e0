"""Each file a command writes is a link to a canary: the canary never changes. What it writes is
found by looking on.

Folders that are links are the user's choice, but for those within a report: test_files.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from greenvis.cli import main as cli
from greenvis.meters.record_writer import Writer
from tests.hostile.bounds import everything
from tests.hostile.test_kills import BASE, TINY

WRITING = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.truncate": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.utime": 0,
}
_opened: list[str] | None = None


def _look_on(event: str, args: tuple[Any, ...]) -> None:
    if _opened is None:
        return
    if event in WRITING or (event == "open" and isinstance(args[2], int) and args[2] & 3):
        path = args[WRITING.get(event, 0)]
        if isinstance(path, (str, bytes, Path)):
            _opened.append(str(Path(path.decode() if isinstance(path, bytes) else path).absolute()))


sys.addaudithook(_look_on)  # for good: a hook cannot be taken away


@contextmanager
def looking_on() -> Iterator[list[str]]:
    """Give the list of the paths that are written at within, as Python's own calls have them."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


COMMANDS: dict[
    str, tuple[Sequence[str], ...]
] = {  # the last one is looked on; those before lay out what it needs
    "run": (("run", "tiny.yaml"),),
    "run and log": (("run", "base.yaml", "--log-with", "tensorboard"),),
    "plan": (("plan", "base.yaml"),),
    "report": (("run", "base.yaml"), ("report", "runs", "--out", "site")),
    "export": (
        ("run", "base.yaml"),
        ("export", "runs/base/full/seed0", "--to", "safetensors", "--out", "out/model"),
    ),
}


def _lay(folder: Path, before: Sequence[Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "base.yaml").write_text(BASE)
    (folder / "tiny.yaml").write_text(TINY)
    for words in before:
        assert cli.main([*words]) == 0


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("plan", True),
        pytest.param("report", False, marks=pytest.mark.slow),
        ("export", True),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("run", "run and log", "report")
        ),
    ],
)
def test_what_is_written_goes_through_no_link(
    name: str, each: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each file a command writes, or else of one of each kind in each folder."""
    *before, words = COMMANDS[name]
    first = tmp_path / "first"
    _lay(first, before, monkeypatch)
    there = set(everything(first))
    with looking_on() as opened:
        assert cli.main([*words]) == 0
    seen = {str(Path(p).relative_to(first)) for p in opened if Path(p).is_relative_to(first)} | set(
        everything(first)
    ) - there
    names = sorted(
        path for path in seen - {"."} if not (first / path).is_dir() and not _drawn(path)
    )
    assert names
    if not each:
        names = [*{(Path(path).parent, Path(path).suffix): path for path in names}.values()]
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("mine")
    untouched = everything(canary)
    laid = tmp_path / "laid"
    _lay(laid, before, monkeypatch)
    for i, path in enumerate(names):
        folder = tmp_path / str(i)
        shutil.copytree(laid, folder)
        monkeypatch.chdir(folder)
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(canary / "file")
        code = cli.main([*words])
        assert everything(canary) == untouched, (path, code)
        assert code in (0, 1, 2)
        shutil.rmtree(folder)


def test_a_record_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "canary").write_text("mine")
    for name in ("canary", "absent"):
        link = tmp_path / f"{name}.rank0.jsonl"
        link.symlink_to(tmp_path / name)
        writer = Writer(link, {"run": "a", "schema": 1})
        writer.close("done")
        assert "cannot write" in writer.problem
    assert (tmp_path / "canary").read_text() == "mine"
    assert not (tmp_path / "absent").exists()


def _drawn(path: str) -> bool:
    """Whether a name holds what nobody knows before: a run's id with its time, or what was drawn
    for a part."""
    return (
        path.endswith((".jsonl", ".part"))
        or "/.new-" in path
        or "tfevents" in path
        or "/.model-" in path
    )
