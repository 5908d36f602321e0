"""The record: what is written is read back, whatever happened to the file; ranks merge; prices are
linear."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenvis.errors import BadInput
from greenvis.meters import carbon, pricing, record_writer
from greenvis.meters.record import Run, find, read
from greenvis.meters.record_writer import Writer

CPU = {
    "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
    "provenance": "estimated",
    "coefficient": {"low": 3.0, "central": 4.0, "high": 6.0},
}  # fmt: skip
GPU = {
    "name": "gpu", "source": "nvml", "scope": "machine", "observation": "gpu_j",
    "provenance": "measured",
    "coefficient": {"low": 1.0, "central": 1.0, "high": 1.0},
}  # fmt: skip
HEADER = {
    "run": "r1",
    "name": "t",
    "host": "h",
    "boot_id": "b",
    "rank": 0,
    "world_size": 1,
    "components": [CPU, GPU],
}


def write(path: Path, cpu_s: float = 10.0, **header) -> Path:
    writer = Writer(path, {**HEADER, **header})
    writer.line("sample", {"phase": "train", "wall_s": 5.0, "cpu_s": cpu_s / 2, "gpu_j": 50.0})
    writer.line("log", {"epoch": 1, "accuracy": 0.5})
    writer.line("sample", {"phase": "train", "wall_s": 10.0, "cpu_s": cpu_s, "gpu_j": 100.0})
    writer.line("sample", {"phase": "train/eval", "wall_s": 1.0, "cpu_s": 1.0, "gpu_j": 5.0})
    writer.line("fact", {"macs": 7, "nan": float("nan")})
    writer.close("done")
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.jsonl"))
    assert (run.id, run.status, run.damaged_lines) == ("r1", "done", 0)
    assert run.totals == {
        "train": {"wall_s": 10.0, "cpu_s": 10.0, "gpu_j": 100.0}, "train/eval": {"wall_s": 1.0,
        "cpu_s": 1.0, "gpu_j": 5.0},
    }  # fmt: skip
    assert (run.sum("cpu_s"), run.sum("cpu_s", "train/eval"), run.sum("dram_j")) == (
        11.0,
        1.0,
        None,
    )
    assert run.logs[0]["totals"]["train"]["cpu_s"] == 5.0
    assert run.facts == {"macs": 7, "nan": "nan"}
    energy = pricing.run_energy(run)
    assert (energy.low, energy.value, energy.high) == (33 + 105, 44 + 105, 66 + 105)
    assert energy.provenance == "estimated"
    assert (
        pricing.add(r for parts in pricing.phases(run).values() for r in parts.values()).value
        == energy.value
    )


def test_lines_are_on_the_disk_when_a_run_ends_and_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def sync(fd: int, real=os.fdatasync) -> None:
        real(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", sync)
    path = tmp_path / "a.jsonl"
    writer = Writer(path, HEADER)
    writer.line("note", {"text": "soon after"})
    assert synced == []
    monkeypatch.setattr(record_writer, "SYNC_EVERY_S", 0.0)  # as if that long had passed
    writer.line("note", {"text": "later"})
    assert synced == [path.stat().st_size]
    monkeypatch.undo()
    monkeypatch.setattr(os, "fdatasync", sync)
    writer.close("done")
    assert synced[1:] == [path.stat().st_size]


def test_repricing_changes_grams_and_nothing_else(tmp_path: Path) -> None:
    energy = pricing.run_energy(read(write(tmp_path / "a.jsonl")))
    grams = [carbon.grams(energy, {"value": v}).value for v in (50.0, 500.0)]
    assert grams[1] == pytest.approx(10 * grams[0])
    assert carbon.grams(energy, {}).value is None


@pytest.mark.parametrize("cut", range(2, 40, 3))
def test_a_record_cut_in_the_middle_of_a_line_keeps_the_rest(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.jsonl")
    os.truncate(path, path.stat().st_size - cut)
    run = read(path)
    assert run.status == "crashed"
    assert run.damaged_lines == 1
    assert run.sum("cpu_s") == 11.0


def test_a_damaged_header_is_read_from_its_copy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([b"\x00\xff noise", *lines[1:4], lines[0], *lines[4:]]))
    assert read(path).sum("cpu_s") == 11.0
    assert read(path).damaged_lines == 1


NOISE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"[" * 100_000,
            b"7",
            b"null",
            b'"x"',
            b'{"type": 3}',
            b'{"type": "sample"}',
            b'{"type": "header"}',
        ]
    ),
    st.just(b'{"type": "sample", "phase": "x", "cpu_s": 1' + b"0" * 400 + b"}"),
    st.just(b'{"type": "sample", "phase": [1], "cpu_s": 1}'),
    st.just(b'{"type": "future", "cpu_s": 1}'),
    st.just(b'{"type": "end"}'),
)


@settings(max_examples=150)
@given(noise=st.lists(st.tuples(st.integers(1, 6), NOISE), max_size=6))
def test_noise_between_the_lines_costs_nothing(
    tmp_path_factory: pytest.TempPathFactory, noise: list[tuple[int, bytes]]
) -> None:
    path = write(tmp_path_factory.mktemp("n") / "a.jsonl")
    lines = path.read_bytes().split(b"\n")
    for at, junk in noise:
        lines.insert(at, junk)
    path.write_bytes(b"\n".join(lines))
    run = read(path)
    assert (run.totals["train"]["cpu_s"], run.totals["train/eval"]["cpu_s"], run.facts["macs"]) == (
        10.0,
        1.0,
        7,
    )
    pricing.run_energy(run)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_file_is_a_record_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("n") / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a greenvis record"):
        read(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text(json.dumps({"type": "header", "schema": 99}))
    with pytest.raises(BadInput, match="upgrade"):
        read(tmp_path / "new.jsonl")
    with pytest.raises(BadInput, match="cannot read"):
        read(tmp_path)
    with pytest.raises(BadInput, match="no record or folder"):
        list(find([tmp_path / "none"]))


def test_a_component_line_replaces_the_headers(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a.jsonl", HEADER)
    writer.line("sample", {"phase": "", "cpu_s": 1.0, "gpu_j": 0.0})
    writer.line(
        "component", {"name": "gpu", "source": "none", "observation": "", "reason": "stood still"}
    )
    writer.close("done")
    parts = pricing.phases(read(tmp_path / "a.jsonl"))[""]
    assert parts["gpu"].value is None
    assert parts["gpu"].reason == "stood still"
    assert parts["cpu"].value == 4.0


def rank(tmp_path: Path, n: int, cpu_s: float, **header) -> Run:
    return read(write(tmp_path / f"r.rank{n}.jsonl", cpu_s=cpu_s, rank=n, world_size=4, **header))


def test_ranks_merge_the_machine_once_and_the_processes_summed(tmp_path: Path) -> None:
    runs = [rank(tmp_path, 0, 10.0), rank(tmp_path, 1, 20.0), rank(tmp_path, 3, 30.0, host="other")]
    merged = pricing.merge(runs)
    assert merged.totals["train"]["cpu_s"] == 60.0
    assert merged.totals["train"]["wall_s"] == 10.0
    assert merged.energy["train"]["cpu"].value == 240.0
    assert merged.energy["train"]["gpu"].value == 200.0  # two hosts, three ranks
    assert merged.missing_ranks == [2]


def test_ranks_with_a_gpu_each_are_charged_for_their_own(tmp_path: Path) -> None:
    runs = [rank(tmp_path, n, 1.0, components=[{**GPU, "devices": [f"GPU-{n}"]}]) for n in range(4)]
    merged = pricing.merge(runs)
    assert merged.energy["train"]["gpu"].value == 400.0
    assert merged.missing_ranks == []
    assert pricing.merge([]).energy == {}
