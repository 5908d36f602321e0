"""Folders full of links: what lies behind them never changes; and what is read is a regular file of
a stated size."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis.core import files, weights
from greenvis.data import output_cache_files
from greenvis.data.output_cache import Cache
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import checkpoint, run_folder
from greenvis.experiment.loop import Progress
from greenvis.report import folder as report_folder
from tests.hostile.bounds import everything


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return a folder that nobody may change."""
    folder = tmp_path / "canary"
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "old.svg").write_text("mine, too")
    return folder


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "text": ("x.txt", lambda folder: files.write(folder / "x.txt", "new")),
    "json": ("done.json", lambda folder: run_folder.write_json(folder / "done.json", {"a": 1})),
    "weights": (
        "m.safetensors",
        lambda folder: weights.write(folder / "m.safetensors", {"a": torch.zeros(2)}, {}),
    ),
    "weights' part": (
        "m.safetensors.part",
        lambda folder: weights.write(folder / "m.safetensors", {"a": torch.zeros(2)}, {}),
    ),
    "json's part": (
        "done.json.part",
        lambda folder: run_folder.write_json(folder / "done.json", {"a": 1}),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_and_its_target_stays(name: str, canary: Path, tmp_path: Path) -> None:
    link, write = WRITERS[name]
    folder, before = tmp_path / "own", everything(canary)
    folder.mkdir()
    (folder / link).symlink_to(canary / "file")
    write(folder)
    assert everything(canary) == before
    written = folder / link.removesuffix(".part")
    assert written.is_file()
    assert not written.is_symlink()
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []


def test_a_lock_that_is_a_link_is_refused(canary: Path, tmp_path: Path) -> None:
    before = everything(canary)
    for target in (canary / "file", canary / "absent"):
        folder = tmp_path / target.name
        folder.mkdir()
        (folder / ".lock").symlink_to(target)
        with pytest.raises(GreenvisError, match="is a link"), run_folder.locked(folder):
            pass
        with pytest.raises(GreenvisError, match="is a link"), output_cache_files.locked(folder):
            pass
    assert everything(canary) == before


@pytest.mark.parametrize("name", ["values.bin", "index.bin", "in-use", "key.json"])
def test_a_cache_whose_files_are_links_is_made_anew(
    name: str, canary: Path, tmp_path: Path
) -> None:
    made = Cache(tmp_path / "caches", {"part": "a"}, length=4)
    made.put([0, 1, 2, 3], torch.ones(4, 3))
    made.close()
    file = made.path / name
    (canary / "copy").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(canary / "copy")
    before = everything(canary)
    notes: list[str] = []
    again = Cache(tmp_path / "caches", {"part": "a"}, length=4, note=notes.append)
    again.put([0], torch.zeros(1, 3))
    again.close()
    assert everything(canary) == before
    assert any("not whole" in note for note in notes)


def test_a_folder_of_ours_that_is_a_link_is_refused(canary: Path, tmp_path: Path) -> None:
    before = everything(canary)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(canary / "figures")
    with pytest.raises(GreenvisError, match="figures is a link"):
        files.own_folder(tmp_path / "out" / "figures" / "deep", tmp_path / "out")
    (tmp_path / "chosen").symlink_to(canary)  # the user's own choice
    assert files.own_folder(tmp_path / "chosen" / "new", tmp_path / "chosen").is_dir()
    (canary / "new").rmdir()
    assert everything(canary) == before


RESULTS = json.dumps({"schema": 1, "arms": {}})


def test_a_report_replaces_what_a_report_wrote_and_nothing_else(tmp_path: Path) -> None:
    site = tmp_path / "site"
    report_folder.publish(site, {"index.html": "a", "figures/old.svg": "a", "exports/co2.md": "a"})
    (site / "figures" / "mine.svg").write_text("mine")
    (site / "notes.txt").write_text("mine")
    report_folder.publish(site, {"index.html": "b", "figures/new.svg": "b"})
    assert {k for k, v in everything(site).items() if v is not None} == {
        ".greenvis-report.json", "figures/mine.svg", "figures/new.svg", "index.html", "notes.txt"
    }  # fmt: skip
    assert (site / "index.html").read_text() == "b"


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "{}",
        "[",
        '{"files": 3}',
        '{"files": ["index.html/../file", "../file", "/etc/passwd", 3]}',
    ],
)
def test_a_folder_of_the_users_is_refused_whatever_its_mark_says(mark: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "file").write_text("mine")
    (site / "index.html").write_text("mine")
    if mark:
        (site / report_folder.LIST).write_text(mark)
    before = everything(tmp_path)
    with pytest.raises(BadInput, match=r"holds 'index.html', which no report of greenvis wrote"):
        report_folder.publish(site, {"index.html": "b"})
    assert everything(tmp_path) == before


def test_a_report_of_an_earlier_greenvis_is_known_by_its_results(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("index.html", "figures/old.svg", "README.md"):
        (tmp_path / name).write_text("old")
    (tmp_path / "results.json").write_text(RESULTS)
    report_folder.publish(tmp_path, {"index.html": "b"})
    assert (tmp_path / "README.md").read_text() == "old"
    assert not (tmp_path / "figures" / "old.svg").exists()


def test_a_report_is_not_written_through_links(canary: Path, tmp_path: Path) -> None:
    before = everything(canary)
    site = tmp_path / "site"
    report_folder.publish(site, {"index.html": "a", "figures/old.svg": "a"})
    (site / "index.html").unlink()
    (site / "index.html").symlink_to(canary / "file")
    (site / report_folder.LIST).rename(site / "kept")
    (site / report_folder.LIST).symlink_to(site / "kept")
    report_folder.publish(site, {"index.html": "b", "figures/old.svg": "b"})
    assert everything(canary) == before
    (site / "figures" / "old.svg").unlink()
    (site / "figures").rmdir()
    (site / "figures").symlink_to(canary / "figures")
    with pytest.raises(GreenvisError, match="figures is a link"):
        report_folder.publish(site, {"index.html": "b", "figures/x.svg": "b"})
    with pytest.raises(BadInput, match=r"holds 'figures/old.svg'"):
        report_folder.publish(site, {"index.html": "b", "figures/old.svg": "b"})
    assert everything(canary) == before


def test_a_report_killed_between_any_two_writes_is_made_whole_by_the_next(
    tmp_path: Path, monkeypatch: Any
) -> None:
    first = {"index.html": "a", "results.json": "a", "figures/a.svg": "a"}
    second = {"index.html": "b", "results.json": "b", "figures/b.svg": "b"}
    replace, left = os.replace, 0

    def dying(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        replace(source, target)

    for killed_at in range(1, 6):
        site = tmp_path / str(killed_at)
        report_folder.publish(site, first)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            left = killed_at
            with pytest.raises(KeyboardInterrupt):
                report_folder.publish(site, second)
        report_folder.publish(site, second)
        assert {
            k: v for k, v in everything(site).items() if v is not None and not k.startswith(".")
        } == {k: v.encode() for k, v in second.items()}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write(path, "old")

    def fail() -> None:
        with files.replacing(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def leave_part(path: Path) -> None:
    """Leave what a writer of a file leaves that is killed in the middle."""
    child = os.fork()
    if not child:
        with files.replacing(path) as part:
            part.write_text("half")
            os._exit(9)
    os.waitpid(child, 0)


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path: Path) -> None:
    leave_part(tmp_path / "x")
    leave_part(tmp_path / "x.part")
    other = tmp_path / ".x.abcdefg.part"  # a letter less than our parts have
    other.write_text("mine")
    (tmp_path / ".x.aaaaaaaa.part").symlink_to(other)
    with files.replacing(tmp_path / "x") as part:
        part.write_text("new")
        files.write(tmp_path / "x", "newer")  # another writer: this part is held
        assert part.exists()
    assert (tmp_path / "x").read_text() == "new"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if n.startswith(".x.part.")]  # of another file
    assert names[:2] == [".x.aaaaaaaa.part", ".x.abcdefg.part"]
    with run_folder.locked(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            ".lock", ".x.aaaaaaaa.part", ".x.abcdefg.part", "x"
        ]  # fmt: skip
    assert other.read_text() == "mine"


def test_a_folder_half_made_goes_with_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with files.new_folder(tmp_path / "made") as part:
            (part / "half").touch()
            os._exit(9)
    os.waitpid(child, 0)
    assert len([*tmp_path.iterdir()]) == 1
    with files.new_folder(tmp_path / "made") as part:
        (part / "x").write_text("new")
    assert everything(tmp_path) == {"made": None, "made/x": b"new"}
    with pytest.raises(BadInput, match="is there already"), files.new_folder(tmp_path / "made"):
        pass
    assert everything(tmp_path) == {"made": None, "made/x": b"new"}


def test_caches_half_made_and_half_removed_go_with_the_next(tmp_path: Path) -> None:
    for name in (".new-abcdefgh", f".old-{'a' * 32}-7", ".new-mine", ".old-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.bin").touch()
    cache = Cache(tmp_path, {"part": "a"}, length=1)
    cache.put([0], torch.ones(1, 3))
    cache.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", ".new-mine", ".old-mine", cache.path.name
    ]  # fmt: skip


def test_only_regular_files_of_a_stated_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 * 2**30)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bad").write_bytes(b"\xff{")
    (tmp_path / "deep").write_text("[" * 200_000)
    for name in (
        "pipe",
        "sparse",
        "socket",
        "loop",
        "bad",
        "deep",
        ".",
        "absent",
        "a\0b",
        "/dev/zero",
        "/dev/full",
    ):
        with pytest.raises(BadInput, match="cannot read the plan") as error:
            files.read_json(tmp_path / name, "plan")
        assert "\0" not in str(error.value)
    unix.close()
    (tmp_path / "good").write_text(json.dumps({"a": 1}))
    assert files.read_json(tmp_path / "good") == {"a": 1}


def test_marks_and_checkpoints_that_are_odd_are_no_marks(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"x" * 100, b"PK\x03\x04" + b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(GreenvisError, match="cannot be read"):
            checkpoint.read(path)
    good = {part: {} for part in checkpoint.PARTS}
    torch.save(good, path)
    assert checkpoint.read(path) == good
    assert checkpoint.progress(checkpoint.read(path), Progress) == Progress()
    odd: list[Any] = [
        None, 3, "x", [], {}, {"progress": {}}, {**good, "live": None}, {**good, "rng": [1]},
    ]  # fmt: skip
    for content in odd:
        torch.save(content, path)
        with pytest.raises(GreenvisError, match="cannot be read"):
            checkpoint.read(path)
    for progress in (
        {"epoch": -1}, {"epoch": "x"}, {"batch": None}, {"step": 0.5}, {"epoch": float("nan")},
        {"more": 1}, {"metrics": 3}, {"metrics": {"a": "x"}}, {"rows": [1]}, {"losses": [1.0]},
        {"losses": ("x", "y")}, {3: 4}, {"reached": []}, {"observed": {}}, {"part": -5},
    ):  # fmt: skip
        torch.save({**good, "progress": progress}, path)
        with pytest.raises(GreenvisError, match="another version"):
            checkpoint.progress(checkpoint.read(path), Progress)
