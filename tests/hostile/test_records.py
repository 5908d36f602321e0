"""Records from strangers and broken disks: what cannot be is left out and said, and the rest is
shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenvis.errors import BadInput
from greenvis.report import report, results
from greenvis.report.comparing import compare
from greenvis.report.listing import ls
from tests.hostile.bounds import bounded, greenvis

CPU = {
    "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
    "coefficient": {"low": 2.9, "central": 4.0, "high": 5.8}, "provenance": "estimated",
    "citation": "x",
}  # fmt: skip
HEADER = {
    "schema": 1, "run": "a", "name": "pets", "arm": "full", "seed": 0, "inputs": "i", "attempt": 1,
    "rank": 0, "world_size": 1,
    "host": "h", "boot_id": "b", "pid": 1, "clock_s": 1e9, "mono_s": 5.0, "components": [CPU],
    "pue": 1.0,
    "carbon_intensity": {"value": 475.0, "zone": "world", "assumed": True},
    "versions": {"torch": "2"}, "command": ["greenvis"],
}  # fmt: skip
SAMPLE = {
    "phase": "train",
    "wall_s": 2.0,
    "cpu_s": 2.0,
    "steps": 3,
    "samples": 9,
    "flops": 1e6,
    "mono_s": 7.0,
    "clock_s": 1e9,
}
FACTS = {"accuracy": 0.5, "macs": 10, "params": 5, "latency_ms": {"p50": 1.0}, "epochs": 1}
END = {"status": "done", "reason": "", "mono_s": 8.0, "clock_s": 1e9 + 3}


def lines(header: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """Return a good record's lines; changes: by line type, keys laid over."""
    made: dict[str, dict[str, Any]] = {
        "header": {**HEADER, **(header or {})},
        "sample": SAMPLE,
        "fact": FACTS,
        "end": END,
    }
    return [{"type": kind, **values, **changes.get(kind, {})} for kind, values in made.items()]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
ODD = (
    None,
    "word",
    "",
    [],
    [1],
    {},
    {"a": 1},
    True,
    -1,
    -1e9,
    1e300,
    1e999,
    float("nan"),
    10**400,
    10**9,
    0.5,
    "\x1b[31m",
    DEEP,
    "x" * 5000,
)
FIELDS = {
    "header": [*HEADER, "embodied", "nested_in", "baseline", "recipe", "git", "cpu"],
    "sample": [k for k in SAMPLE if k != "phase"] + ["phase", "ram_gb_s", "gpu_j",
    "cpu_j_unseen_s"],
    "fact": [*FACTS, "inference_energy_j", "operating_points", "predicted", "data", "model",
    "codecarbon", "task_accuracy",
             "techniques", "train", "stream", "task_energy_j", "images_per_s", "peak_memory_mb",
             "recipe"],
    "end": [*END],
    "uses": ["role", "name", "runs", "energy_j", "of", "seed"],
    "log": ["accuracy", "loss", "epoch", "phase", "mono_s"],
    "component": [*CPU],
    "note": ["text"],
}  # fmt: skip


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one good record in it."""
    folder = tmp_path_factory.mktemp("good")
    write(
        folder / "good.rank0.jsonl",
        lines({"run": "good", "arm": "plain", "seed": 1, "inputs": "j", "pid": 2}),
    )
    return folder


def odd(kind: str, field: str, value: Any, **header: Any) -> list[dict[str, Any]]:
    """Return a record's lines with one odd field."""
    content = lines(header)
    if kind in ("uses", "log", "component", "note"):
        base: dict[str, dict[str, Any]] = {
            "uses": {"role": "base", "name": "b", "runs": ["r"], "energy_j": {"value": 1.0},
                     "of": []},
            "log": {}, "component": CPU, "note": {},
        }  # fmt: skip
        content.insert(2, {"type": kind, **base[kind], field: value})
    else:
        next(line for line in content if line["type"] == kind)[field] = value
    return content


def third(kind: str, part: int) -> Iterator[tuple[str, int, Any]]:
    """Yield fields with a third of the odd values: each field other ones."""
    for number, field in enumerate(FIELDS[kind]):
        for i, value in enumerate(ODD):
            if (i + number) % 3 == part:
                yield field, i, value


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("part", range(3))
def test_one_odd_field_does_not_blind_a_folder(
    kind: str, part: int, beside: Path, tmp_path: Path
) -> None:
    for field, i, value in third(kind, part):
        folder = tmp_path / f"{field}{i}"
        shutil.copytree(beside, folder)
        write(folder / "odd.rank0.jsonl", odd(kind, field, value))
        with bounded(5):
            made = results(folder).as_json()
            rows = ls([folder])
            compare(folder, beside)
        assert made["arms"]["plain"]["accuracy"]["mean"] == 0.5, (field, value)
        json.dumps(made, allow_nan=False)
        assert any(row["run"] == "good" for row in rows), (field, value)
        shutil.rmtree(folder)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("part", range(3))
def test_a_folder_full_of_them_is_reported_within_bounds(
    kind: str, part: int, beside: Path, tmp_path: Path
) -> None:
    shutil.copytree(beside, tmp_path / "runs")
    for field, i, value in third(kind, part):
        own = {"run": f"{field}{i}", "arm": f"{field}{i}", "pid": i}
        write(tmp_path / "runs" / f"{field}{i}.jsonl", odd(kind, field, value, **own))
    for words in (("ls", "runs"), ("report", "runs", "--out", "out"), ("diff", "runs", "runs")):
        said = greenvis(*words, cwd=tmp_path, seconds=60)
        assert said.code == 0, said
    made = json.loads((tmp_path / "out" / "results.json").read_text())
    assert made["arms"]["plain"]["accuracy"]["mean"] == 0.5
    assert all(0 <= (arm["accuracy"]["mean"] or 0) <= 1 for arm in made["arms"].values())


@pytest.mark.parametrize(
    "field", ["rank", "world_size", "pue", "components", "carbon_intensity", "clock_s"]
)
def test_a_whole_report_is_written_and_says_what_was_left_out(
    field: str, beside: Path, tmp_path: Path
) -> None:
    shutil.copytree(beside, tmp_path / "runs")
    write(tmp_path / "runs" / "odd.rank0.jsonl", lines({field: -1}))
    page = report(tmp_path / "runs", out=tmp_path / "out")
    text = (page.parent / "report.md").read_text()
    assert "odd.rank0.jsonl" in text
    assert field in text.replace("\\", "")


def test_what_is_no_record_is_left_out(beside: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(beside, folder)
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "zeros.jsonl").write_bytes(bytes(10_000))
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "new.jsonl").write_text(json.dumps({"type": "header", **HEADER, "schema": 99}) + "\n")
    with (folder / "sparse.jsonl").open("wb") as file:
        file.truncate(2 * 2**30)
    found = results(folder).as_json()
    assert [*found["arms"]] == ["plain"]
    for name in ("pipe", "zeros", "deep", "empty", "new", "sparse"):
        assert any(f"{name}.jsonl" in note for note in found["notes"]), name
    said: list[str] = []
    assert [row["run"] for row in ls([folder], say=said.append)] == ["good"]
    for name in ("pipe", "zeros", "deep", "new", "sparse"):
        assert any(f"{name}.jsonl" in line for line in said), name


def test_of_two_copies_the_more_complete_counts(tmp_path: Path) -> None:
    whole = lines()
    write(
        tmp_path / "1" / "a.rank0.jsonl", whole[:2]
    )  # copied while it was written, with a phase that the whole one lacks
    part = [
        *whole[:2],
        {"type": "sample", **SAMPLE, "phase": "eval", "cpu_s": 0.1, "wall_s": 0.1, "mono_s": 6.0},
    ]
    write(tmp_path / "1" / "b.rank0.jsonl", part)
    write(tmp_path / "2" / "a.rank0.jsonl", whole)
    for order in (("1", "2"), ("2", "1")):
        found = results([tmp_path / name for name in order]).as_json()
        assert found["arms"]["full"]["status"] == "done"
        assert found["arms"]["full"]["accuracy"]["mean"] == 0.5


def test_a_foreign_record_with_a_known_id_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.rank0.jsonl", lines())
    foreign = lines(
        {"host": "other", "arm": "full"},
        sample={"cpu_s": 1e6, "mono_s": 1e7},
        fact={"accuracy": 1.0},
    )
    for name in ("0.rank0.jsonl", "zz.rank0.jsonl"):
        path = write(tmp_path / name, foreign)
        found = results(tmp_path).as_json()
        assert found["arms"]["full"]["accuracy"]["mean"] == 0.5
        assert any("claims the id of a.rank0.jsonl" in note for note in found["notes"])
        path.unlink()


def test_the_newest_run_is_told_by_attempts_not_by_a_clock_that_was_set_back(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.rank0.jsonl", lines({"clock_s": 2e9}))
    newer = {"run": "n", "inputs": "new", "attempt": 2, "clock_s": 1e9, "pid": 3}
    write(tmp_path / "n.rank0.jsonl", lines(newer, fact={"accuracy": 0.9}))
    assert results(tmp_path).as_json()["arms"]["full"]["accuracy"]["mean"] == 0.9


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "3", "[" * 100_000, '{"schema": 1}', '{"schema": 1, "arms": 3}', '{"schema": '
                                                                                      '1, "arms": '
                                                                                      '{"a": 3}}',
     '{"schema": 1, "arms": {"a": {}}, "baseline": "b"}', '{"schema": "1", "arms": {}}',
     '{"schema": 1, "arms": {}}',
     '{"schema": 1, "arms": {"a": {"accuracy": {"mean": NaN}}}, "order": ["a"], "baseline": null, '
     '"metric": "accuracy"}'],
)  # fmt: skip
def test_results_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "report.md").write_text("# x\n")
    for words in (
        ("report", tmp_path / "results.json", "--out", tmp_path / "out"),
        ("compare", tmp_path, tmp_path),
    ):
        with pytest.raises(BadInput):
            report(words[1], out=tmp_path / "out") if words[0] == "report" else compare(
                words[1], words[2]
            )


def test_the_commands_say_it_in_a_line(beside: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text("no record\n")
    for words, code in (
        (("report", "x.jsonl"), 2),
        (("ls", "x.jsonl"), 2),
        (("ls", "y.jsonl"), 2),
        (("ls", "."), 0),
        (("report", "."), 2),
        (("overview", "."), 2),
    ):
        said = greenvis(*words, cwd=tmp_path, seconds=2)
        assert said.code == code, said
        assert "y.jsonl" in said.err or words != ("ls", ".")
