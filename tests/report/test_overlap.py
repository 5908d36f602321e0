"""Runs that overlap in time: what several saw of one counter or one process is counted once, and
the report says so."""

from __future__ import annotations

import json
import math
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import greenvis as gv
from greenvis.meters.record_writer import Writer
from greenvis.report import overlap, results

ONE = {"low": 1.0, "central": 1.0, "high": 1.0}
RAPL = {
    "name": "cpu",
    "source": "rapl",
    "scope": "machine",
    "observation": "cpu_j",
    "provenance": "measured",
    "coefficient": ONE,
}
MODEL = {
    "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
    "provenance": "estimated",
    "coefficient": {"low": 3.0, "central": 4.0, "high": 6.0},
}  # fmt: skip
CLOCK = {**MODEL, "source": "wall time", "observation": "wall_s", "provenance": "constant"}


def gpu(*devices: str) -> dict[str, Any]:
    return {
        **RAPL,
        "name": "gpu",
        "source": "nvml",
        "observation": "gpu_j",
        "devices": list(devices),
    }


def write(
    folder: Path, name: str, begin: float, end: float, watts: float = 100.0, **header: Any
) -> None:
    """Write the record of a run that saw `watts` of everything it observes, sampled about each
    second."""
    head = {
        "run": name, "name": name, "arm": name, "seed": 0, "inputs": name, "host": "h",
        "boot_id": "b",
        "pid": zlib.crc32(name.encode()), "parents": [], "mono_s": begin, "clock_s": 1e9 + begin,
        "nested_in": None,
        "components": [RAPL],
    } | header  # fmt: skip
    writer = Writer(folder / f"{name}.jsonl", head)
    for i in range(1, math.ceil(end - begin) + 1):
        at = min(begin + i, end)
        seen = {c["observation"]: watts * (at - begin) for c in head["components"]} | {
            "wall_s": at - begin
        }
        writer.line("sample", {"phase": "train", **seen, "mono_s": at})
    writer.line("end", {"status": "done", "mono_s": end})


def total(folder: Path) -> float:
    return results([folder]).as_json()["totals"]["energy_j"]["value"]


def arms(folder: Path) -> dict[str, float]:
    return {
        name: arm["total_energy_j"]["value"]
        for name, arm in results([folder]).as_json()["arms"].items()
    }


@pytest.mark.parametrize(
    ("runs", "once"),
    [
        ([(0, 10), (0, 10)], 1000),
        ([(0, 10), (4, 14)], 1400),
        ([(0, 10), (2, 5), (4, 14)], 1400),
        ([(0, 10), (10, 20)], 2000),
        ([(0.0, 3.3), (1.7, 9.9), (2.2, 3.0), (8.1, 12.6)], 1260),
    ],
)
def test_a_machines_counter_is_counted_once(
    tmp_path: Path, runs: list[tuple[float, float]], once: float
) -> None:
    for i, (begin, end) in enumerate(runs):
        write(tmp_path, f"job{i}", begin, end)
    assert total(tmp_path) == pytest.approx(once)
    assert sum(arms(tmp_path).values()) == pytest.approx(
        once
    )  # in equal parts, whoever ran at that moment


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.5, 20)), min_size=1, max_size=6))
def test_whatever_overlaps_comes_to_the_time_that_any_ran(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[float, float]]
) -> None:
    folder = tmp_path_factory.mktemp("r")
    for i, (begin, length) in enumerate(runs):
        write(folder, f"job{i}", begin, begin + length)
    moments = sorted({m for begin, length in runs for m in (begin, begin + length)})
    ran = sum(b - a for a, b in pairwise(moments) if any(x <= a and b <= x + n for x, n in runs))
    assert total(folder) == pytest.approx(100 * ran)


@pytest.mark.parametrize(
    "header",
    [
        {"host": "other"},
        {"boot_id": "later"},
        {"components": [gpu("GPU-1")]},
        {"components": [MODEL]},
    ],
)
def test_other_machines_boots_and_counters_are_not_shared(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    mine = [gpu("GPU-0")] if "GPU" in str(header) else [MODEL] if "model" in str(header) else [RAPL]
    write(tmp_path, "a", 0, 10, components=mine)
    write(tmp_path, "b", 0, 10, **header)
    priced = 4 if mine == [MODEL] else 1
    assert total(tmp_path) == pytest.approx(2000 * priced)
    assert results([tmp_path]).as_json()["totals"]["overlapping"]["starts"] == 0


def test_cards_are_shared_one_by_one(tmp_path: Path) -> None:
    write(tmp_path, "one", 0, 10, watts=100, components=[gpu("GPU-0")])
    write(tmp_path, "both", 0, 10, watts=200, components=[gpu("GPU-0", "GPU-1")])
    assert arms(tmp_path) == pytest.approx({"one": 500, "both": 1500})
    assert total(tmp_path) == pytest.approx(2000)


def test_watts_by_the_clock_are_the_machines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, 0, 10, components=[CLOCK])
    assert total(tmp_path) == pytest.approx(40)
    assert {arm["wall_s"] for arm in results([tmp_path]).as_json()["arms"].values()} == {10.0}


@pytest.mark.parametrize("component", [RAPL, MODEL])
def test_a_run_inside_another_is_counted_by_it(tmp_path: Path, component: dict[str, Any]) -> None:
    priced = component["coefficient"]["central"]
    write(tmp_path, "outer", 0, 10, pid=7, components=[component])
    write(tmp_path, "inner", 2, 6, pid=7, nested_in="outer", components=[component])
    write(tmp_path, "child", 3, 5, pid=8, nested_in="inner", parents=[7, 1], components=[component])
    assert total(tmp_path) == pytest.approx(1000 * priced)
    assert arms(tmp_path) == pytest.approx(
        {"outer": 1000 * priced, "inner": 400 * priced, "child": 200 * priced}
    )
    assert results([tmp_path]).as_json()["totals"]["nested_runs"] == 2


def test_trackers_of_one_process_that_cross_lose_and_double_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10, pid=7, components=[MODEL])
    write(tmp_path, "b", 5, 25, pid=7, nested_in="a", components=[MODEL])
    assert total(tmp_path) == pytest.approx(25 * 400)
    assert arms(tmp_path) == pytest.approx({"a": 7.5 * 400, "b": 17.5 * 400})


def test_two_threads_that_start_together_share_their_process(tmp_path: Path) -> None:
    write(tmp_path, "a", 0, 10, pid=7, components=[MODEL])
    write(tmp_path, "b", 0.001, 9, pid=7, components=[MODEL])
    assert total(tmp_path) == pytest.approx(10 * 400, rel=1e-3)
    assert sum(arms(tmp_path).values()) == pytest.approx(10 * 400, rel=1e-3)


def test_threads_within_a_tracker_of_the_main_thread_share_what_it_counts(tmp_path: Path) -> None:
    write(tmp_path, "main", 0, 10, pid=7, components=[MODEL])
    for name in ("a", "b"):
        write(tmp_path, name, 2, 8, pid=7, nested_in="main", components=[MODEL])
    assert total(tmp_path) == pytest.approx(4000)
    assert arms(tmp_path) == pytest.approx({"main": 4000, "a": 1200, "b": 1200})


def test_a_child_that_tracked_itself_before_its_parent_did_is_counted_once(tmp_path: Path) -> None:
    write(tmp_path, "child", 0, 10, pid=8, parents=[7], components=[MODEL])
    write(
        tmp_path, "parent", 2, 6, pid=7, watts=150, components=[MODEL]
    )  # its own work and the child's
    assert total(tmp_path) == pytest.approx(4 * (6 * 100 + 4 * 150))


def test_a_child_that_outlives_its_parents_tracker_counts_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "parent", 0, 6, pid=7, components=[MODEL])
    write(tmp_path, "child", 2, 10, pid=8, parents=[7], nested_in="parent", components=[MODEL])
    assert total(tmp_path) == pytest.approx(4 * 1000)


def test_old_records_without_times_count_as_before(tmp_path: Path) -> None:
    write(tmp_path, "outer", 0, 10, mono_s=None)
    write(tmp_path, "inner", 2, 6, nested_in="outer", mono_s=None)
    assert total(tmp_path) == pytest.approx(1000)
    assert arms(tmp_path) == pytest.approx({"outer": 1000, "inner": 400})


def test_the_report_states_it(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "runs", f"job{i}", 0, 10)
    gv.report([tmp_path / "runs"], out=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    both = found["totals"]["overlapping"]
    assert (both["starts"], both["seen_j"]["value"], both["counted_j"]["value"]) == (
        3,
        3000,
        pytest.approx(1000),
    )
    assert {arm["train_energy_j"]["provenance"] for arm in found["arms"].values()} == {"estimated"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "3 start(s) overlap" in text
    assert "Together they read 3" in text


def test_what_serving_observed_is_shared_as_the_counter_was() -> None:
    parts = [
        overlap.Piece(0.0, 10.0, own=True, shares={"cpu_j": 1.0}),
        overlap.Piece(10.0, 20.0, own=True, shares={"cpu_j": 0.5}),
    ]
    alone, both, beside = (
        {"samples": 8.0, "cpu_j": 4.0, "from_s": begin, "to_s": end}
        for begin, end in ((2.0, 4.0), (8.0, 12.0), (12.0, 14.0))
    )
    shared = overlap.facts({"accuracy": 0.5, "inference": {"rounds": [alone, both, beside]}}, parts)
    assert shared["accuracy"] == 0.5
    assert [r["cpu_j"] for r in shared["inference"]["rounds"]] == [4.0, 3.0, 2.0]
    assert [r["samples"] for r in shared["inference"]["rounds"]] == [8.0] * 3
