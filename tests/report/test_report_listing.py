"""Listing, comparing and gating runs; the index behind the list."""

from __future__ import annotations

import io
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import synthetic

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.meters import pricing, record
from greenvis.meters.header import is_running
from greenvis.report import listing, listing_index, report, results
from greenvis.report.comparing import compare, diff
from greenvis.report.listing import group, ls
from greenvis.report.listing_index import location


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.study(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the index of this test lies."""
    file = tmp_path / "cache" / "greenvis" / "listing.sqlite"
    monkeypatch.setattr(listing_index, "location", lambda: file)
    return file


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the records that are parsed from now on."""
    paths: list[Path] = []

    def parse(content: bytes, path: Path) -> record.Run:
        paths.append(path)
        return real(content, path)

    real = record.parse
    monkeypatch.setattr(record, "parse", parse)
    return paths


def test_a_row_is_what_the_record_says(study: Path, tmp_path: Path, index: Path) -> None:
    cut = synthetic.write(tmp_path, "cut")
    cut.write_bytes(cut.read_bytes()[:-200])
    noisy = synthetic.write(tmp_path, "noisy", accuracy=0.5)
    noisy.write_bytes(
        b"\n\xff\n" + noisy.read_bytes().replace(b'"phase":"eval"', b'"phase":"ev\\u0061l"', 1)
    )
    (tmp_path / "no.jsonl").write_text("[]\n{}\n")
    for _ in ("parsed", "from the index"):
        rows = {row["path"]: row for row in ls([study, tmp_path])}
        assert set(rows) == {str(p) for p in record.find([study, tmp_path])} - {
            str(tmp_path / "no.jsonl")
        }
        for path, row in rows.items():
            run = record.read(path)
            spent = pricing.run_energy(run)
            assert (row["run"], row["status"]) == (run.id, run.status)
            assert (row["energy_j"], row["energy_low_j"], row["energy_high_j"]) == (
                spent.value,
                spent.low,
                spent.high,
            )
            assert row["wall_s"] == run.sum("wall_s")
    assert (rows[str(noisy)]["metric"], rows[str(noisy)]["score"]) == ("accuracy", 0.5)


def test_only_what_changed_is_parsed_again(
    tmp_path: Path, index: Path, parsed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    paths = [synthetic.write(runs, arm) for arm in ("plain", "lora", "prompt")]
    first = ls(runs)
    assert len(parsed) == 3
    assert ls(runs) == first
    assert len(parsed) == 3
    (runs / "moved").mkdir()
    paths[0] = paths[0].rename(runs / "moved" / "plain.jsonl")
    assert {row["path"] for row in ls(runs)} == set(map(str, paths))
    assert len(parsed) == 3
    # neither size nor time tells this change
    status, text = paths[1].stat(), paths[1].read_bytes()
    paths[1].write_bytes(text.replace(b'"status":"done"', b'"status":"dont"'))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert paths[1].stat().st_size == status.st_size
    assert sorted(row["status"] for row in ls(runs)) == ["done", "done", "dont"]
    assert parsed[3:] == [paths[1]]
    monkeypatch.setattr(listing, "_code", lambda: b"of another version")
    ls(runs)
    assert len(parsed) == 7


def test_the_list_adds_up_to_what_the_report_says_of_all_runs(study: Path, index: Path) -> None:
    listed = sum(row["energy_j"] for row in ls(study))
    assert listed == pytest.approx(results(study).totals.energy_j.value)


def test_a_run_that_goes_on_is_no_crash(tmp_path: Path, index: Path) -> None:
    with gv.track("t", dir=tmp_path, quiet=True) as run:
        assert [row["status"] for row in ls(tmp_path)] == ["running"]
        page = report(tmp_path, out=tmp_path / "report")
        assert "t has no finished run (running)" in (page.parent / "report.md").read_text()
        header = record.read(run.path).header
    assert [row["status"] for row in ls(tmp_path)] == ["done"]
    others = {
        "same process": {},
        "another machine": {"host": "elsewhere"},
        "before the machine started": {"boot_id": "another"},
        "a pid that came round again": {"clock_s": header["clock_s"] - 1e6},
        "no process": {"pid": 2**22 + 1},
        "no pid": {"pid": "?"},
    }
    got = {why: is_running(header | other) for why, other in others.items()}
    assert got == dict.fromkeys(others, False) | {"same process": True}


def test_what_is_left_out_is_said_each_time(
    tmp_path: Path, index: Path, parsed: list[Path]
) -> None:
    runs = tmp_path / "runs"
    synthetic.write(runs, "plain")
    odd = synthetic.write(runs, "odd", facts={"macs": -1})
    (runs / "no.jsonl").write_text("{}\n")
    first: list[str] = []
    rows = ls(runs, say=first.append)
    assert len(rows) == 2
    assert any(line.startswith(f"{odd.name}: left out: its fact 'macs'") for line in first)
    assert any("no.jsonl is not a greenvis record" in line for line in first)
    again: list[str] = []
    assert ls(runs, say=again.append) == rows
    assert again == first
    odd.rename(odd.with_name("renamed.jsonl"))
    again.clear()
    ls(runs, say=again.append)
    assert any(line.startswith("renamed.jsonl: left out: its fact 'macs'") for line in again)
    assert len(parsed) == 3 + 2 + 2  # the whole one once


def _garbage(index: Path) -> None:
    index.write_bytes(b"\0garbage" * 500)


def _cut(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:-5000])


def _holed(index: Path) -> None:
    """Its first page is well, so that it opens."""
    content = bytearray(index.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    index.write_bytes(content)


def _other_tables(index: Path) -> None:
    index.unlink()
    with closing(sqlite3.connect(index)) as db, db:
        db.execute("CREATE TABLE entries (a, b, c)")


def _other_entries(index: Path) -> None:
    with closing(sqlite3.connect(index)) as db, db:
        entries = ["{}", "[1]", '{"energy_j": 0}', "no JSON", None, b"\xff", "[" * 100_000]
        for i, (key,) in enumerate(db.execute("SELECT key FROM entries").fetchall()):
            db.execute("UPDATE entries SET entry = ? WHERE key = ?", (entries[i % 7], key))


def _link(index: Path) -> None:
    index.rename(index.parent / "elsewhere")
    index.symlink_to(index.parent / "elsewhere")


def _folder_link(index: Path) -> None:
    index.parent.rename(index.parent.parent / "elsewhere")
    index.parent.symlink_to(index.parent.parent / "elsewhere")


def _folder(index: Path) -> None:
    index.unlink()
    index.mkdir()


def _pipe(index: Path) -> None:
    index.unlink()
    os.mkfifo(index)


def _of_all(index: Path) -> None:
    index.chmod(0o666)


REBUILT = (_garbage, _cut, _holed, _other_tables, _other_entries)
REFUSED = (_link, _folder_link, _folder, _pipe, _of_all)


@pytest.mark.parametrize("spoil", [*REBUILT, *REFUSED], ids=lambda f: f.__name__)
def test_a_spoilt_index_shows_nothing_wrong(
    spoil: Callable[[Path], None], tmp_path: Path, index: Path, parsed: list[Path]
) -> None:
    synthetic.many(tmp_path / "runs", 20, 4)
    rows = ls(tmp_path / "runs")
    spoil(index)
    assert ls(tmp_path / "runs") == rows
    assert len(parsed) == 160
    assert ls(tmp_path / "runs") == rows
    assert len(parsed) == (160 if spoil in REBUILT else 240)


def test_without_a_cache_folder_records_are_read(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    rows = ls(study)
    for cache in (tmp_path / "file", Path("/dev/null"), Path("/proc/none")):
        monkeypatch.setattr(listing_index, "location", lambda cache=cache: cache / "g" / "i.sqlite")
        assert ls(study) == rows
    assert (tmp_path / "file").read_text() == "mine"


def test_the_index_lies_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert location() == tmp_path / "greenvis" / "listing.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert location() == tmp_path / ".cache" / "greenvis" / "listing.sqlite"


def test_while_another_process_writes_the_index_records_are_read(
    study: Path, index: Path, parsed: list[Path]
) -> None:
    rows = ls(study)
    with closing(sqlite3.connect(index)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert ls(study) == rows
    assert len(parsed) == 2 * len(rows)


def test_a_folder_of_runs_brings_no_index_and_gets_none(tmp_path: Path, index: Path) -> None:
    runs = tmp_path / "runs"
    synthetic.write(runs, "plain")
    rows = ls(runs)
    with closing(sqlite3.connect(index)) as db, db:
        db.execute("UPDATE entries SET entry = replace(entry, '\"done\"', '\"lies\"')")
    (runs / "greenvis").mkdir()
    index.rename(runs / "greenvis" / index.name)
    shutil.copy(runs / "greenvis" / index.name, runs / index.name)
    before = sorted(runs.rglob("*"))
    assert ls(runs) == rows
    assert sorted(runs.rglob("*")) == before


def test_ls_rows_filter_and_sort(study: Path) -> None:
    rows = ls(study)
    assert len(rows) == 13
    assert rows == sorted(rows, key=lambda r: (r["started_s"], r["run"]))
    assert {r["arm"] for r in ls(study, where="LORA") if "lora" not in r["name"]} <= {"lora"}
    assert [r["arm"] for r in ls([study], where="failed")] == ["diverged"]
    spent = [r["energy_j"] for r in ls(str(study / "**"), sort="-energy_j")]
    assert spent == sorted(spent, reverse=True)
    by_arm = {r["arm"]: r for r in group(rows)}
    assert (by_arm["lora"]["runs"], by_arm["lora"]["done"]) == (5, 4)
    assert by_arm["diverged"]["score"] is None
    assert sum(r["energy_j"] for r in by_arm.values()) == pytest.approx(
        sum(r["energy_j"] for r in rows)
    )
    with pytest.raises(BadInput, match="cannot group by"):
        group(rows, by=["armm"])
    with pytest.raises(BadInput, match="did you mean 'energy_j'"):
        ls(study, sort="enrgy_j")


def test_compare_any_two(study: Path, tmp_path: Path) -> None:
    rows = {r["quantity"]: r for r in compare(study / "baseline", study / "lora")}
    assert rows["train_energy_j"]["arm"] == "baseline → lora"
    assert rows["train_energy_j"]["ratio"] < 0.7
    assert rows["params"]["change_percent"] == 0
    folder = report(study, out=tmp_path).parent
    assert all(
        r["ratio"] == pytest.approx(1) for r in compare(folder, study) if r["ratio"] is not None
    )
    with pytest.raises(BadInput, match="none in common"):
        compare(study / "baseline", _two(tmp_path / "two"))


def _two(folder: Path) -> Path:
    synthetic.write(folder, "x")
    synthetic.write(folder, "y")
    return folder


def test_diff_gates_on_energy(study: Path, tmp_path: Path) -> None:
    committed = report(study / "baseline", out=tmp_path / "old").parent / "results.json"
    for seed in range(3):
        synthetic.write(
            tmp_path / "new",
            "baseline",
            seed,
            cpu_s=1.04 * (800 + 9 * seed),
            epochs=6,
            infer_j=0.0031,
        )
    fine, [row] = diff(committed, tmp_path / "new", "+5%")
    assert fine
    assert row["ratio"] == pytest.approx(1.04, abs=0.005)
    assert (
        row["low"] <= row["ratio"] <= row["high"]
    )  # paired by seed, though one side is a results.json
    fine, [row] = diff(committed, tmp_path / "new", "+3%")
    assert not fine
    assert row["why"] == "+3.8 % is over +3.0 %"
    assert not diff(committed, tmp_path / "new", "-10%")[0]


def test_diff_fails_where_an_arm_is_missing(study: Path, tmp_path: Path) -> None:
    old = report(study, out=tmp_path / "old").parent
    fine, rows = diff(old, study / "lora")
    assert not fine
    why = {r["arm"]: r["why"] for r in rows}
    assert "no arm 'baseline'" in why["baseline"]
    assert why["lora"] == ""
    assert "diverged" not in why  # it had not finished before either


@pytest.mark.parametrize("text", ["5", "five", "+5", "", "5%%"])
def test_a_limit_is_a_percentage(study: Path, text: str) -> None:
    with pytest.raises(BadInput, match="write a percentage"):
        diff(study, study, text)


def test_what_is_no_results_json(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for text in ("{}", "[", '{"arms": []}'):
        file.write_text(text)
        with pytest.raises(BadInput, match=r"is not a results|cannot read the results"):
            compare(file, file)
    file.write_text('{"arms": {}, "schema": 99}')
    with pytest.raises(BadInput, match="schema 99"):
        compare(file, file)


@pytest.mark.slow
def test_four_hundred_runs_are_all_there(tmp_path: Path) -> None:
    """How long ten thousand take is `greenvis bench listing`."""
    synthetic.many(tmp_path / "runs", 100, 4)
    assert len(ls(tmp_path / "runs")) == 400
    found = results(tmp_path / "runs").as_json()
    assert len(found["order"]) == 100


def test_rows_and_results_fit_a_terminal(study: Path) -> None:
    from rich.console import Console

    from greenvis.report import results, table, terminal

    listed = terminal.rows(ls(study))
    assert set(listed[0]) == {"run", "arm", "seed", "status", "accuracy", "energy", "CO₂e", "time"}
    assert any(r["arm"] == "fashion-lora/lora" and r["energy"].endswith("kJ") for r in listed)
    compared = {
        r["quantity"]: r for r in terminal.rows(compare(study / "baseline", study / "lora"))
    }
    assert re.fullmatch(r"[+−]\d+\.\d\d points", compared["accuracy"]["change"])
    assert re.fullmatch(r"[+−]\d+\.\d %", compared["train_energy_j"]["change"])
    assert compared["latency_p50_ms"]["a"] == "11.2 ms"
    assert compared["images_per_s"]["a"] == "212"
    assert compared["peak_memory_mb"]["a"] == "903 MB"
    [gated] = terminal.rows(diff(study / "baseline", study / "lora", "-60%")[1])
    assert (gated["ok"], gated["limit"]) == ("NO", "−60.0 %")
    assert terminal.rows(group(ls(study)))[0]["energy_j"].endswith("J")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(results(study)))
    lines = console.export_text().split("\n")
    assert len(lines) < 30
    assert all("470 mg" in x for x in lines if "88.9" in x)  # no column is cut off
