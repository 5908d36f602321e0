"""Every other file that is read: coefficients, results, archives, meter logs, plans. Exit 2 with
file and reason, at once."""

from __future__ import annotations

import copy
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenvis.bench import gpu
from greenvis.bench.gpu import _stored
from greenvis.errors import BadInput
from greenvis.meters import run_names
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.energy import Replay
from greenvis.planning import candidates, probe
from greenvis.report import archive, report, stored
from greenvis.report.comparing import compare
from greenvis.report.overview import overview
from tests.hostile.bounds import bounded, everything, greenvis
from tests.hostile.test_records import lines, write

REPORTS = Path(__file__).parents[2] / "reports"
BAND = {"low": 1.0, "central": 2.0, "high": 3.0}


def sparse(path: Path) -> None:
    """Make a file of 2 GB that takes no room."""
    with path.open("wb") as file:
        file.truncate(2 * 2**30)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "2 GB": sparse,
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "deep lists": lambda path: path.write_text("[" * 200_000),
    "deep mappings": lambda path: path.write_text('{"a":' * 200_000),
    "nothing": lambda path: path.write_text(""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "a zero byte": lambda path: path.write_bytes(b"{}\0"),
    "a number": lambda path: path.write_text("3"),
    "5,000 digits": lambda path: path.write_text("9" * 5000),
    "a list": lambda path: path.write_text("[1]"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "coefficients": load_coefficients,
    "results": stored.read,
    "a meter log": Replay,
    "a measured cell": lambda path: _stored.read_cell(path, "odd"),
    "plans": lambda path: candidates._plans(path),
    "a protocol": lambda path: probe._protocol(path),
}


@pytest.mark.parametrize("file", ODD_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_is_refused_by_its_name(reader: str, file: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    ODD_FILES[file](path)
    with bounded(1), pytest.raises(BadInput, match=r"odd\.json"):
        READERS[reader](path)


COMMANDS: dict[str, tuple[str, ...]] = {
    "a report of results": ("report", "odd.json", "--out", "out"),
    "a comparison": ("compare", "odd.json", "odd.json"),
    "a gate": ("diff", "odd.json", "odd.json"),
    "a listing": ("ls", "odd.json"),
    "a machine": ("doctor",),
    "a command": ("track", "--", "true"),
    "plans": ("advise", "plain/mlp", "--data", "digits", "--plans", "odd.json"),
    "a recipe": ("plan", "odd.json"),
}


@pytest.mark.parametrize("file", ODD_FILES)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_by_its_name(command: str, file: str, tmp_path: Path) -> None:
    ODD_FILES[file](tmp_path / "odd.json")
    before = [p.name for p in tmp_path.rglob("*")]
    own = {"GREENVIS_COEFFICIENTS": "odd.json"} if command in ("a machine", "a command") else {}
    said = greenvis(*COMMANDS[command], cwd=tmp_path, env=own, seconds=2)
    if (command, file) == ("a listing", "a folder"):  # in which no run is
        assert said.code == 0, said
    else:
        assert said.code == 2, said
        assert "odd.json" in said.err
    assert [p.name for p in tmp_path.rglob("*")] == before


COEFFICIENTS: dict[str, Any] = {
    "an unknown key": {"cpu": BAND},
    "a word": {"ram_w_per_gb": {**BAND, "low": "x"}},
    "true for nothing": {"ram_w_per_gb": None},
    "out of order": {"ram_w_per_gb": {**BAND, "low": 5.0}},
    "below 0": {"ram_w_per_gb": {**BAND, "low": -1.0}},
    "1e999": {"ram_w_per_gb": {**BAND, "high": float("inf")}},
    "NaN": {"ram_w_per_gb": {**BAND, "central": float("nan")}},
    "beyond all watts": {"ram_w_per_gb": {**BAND, "high": 1e12}},
    "beyond all floats": {"ram_w_per_gb": {**BAND, "high": 10**400}},
    "a list of bands": {"ram_w_per_gb": [BAND]},
    "processors that are none": {"processors": 3},
    "a processor that is none": {"processors": [3]},
    "a processor of 0 threads": {"processors": [{"match": "x", "tdp_w": 1, "threads": 0}]},
    "a processor of NaN watts": {
        "processors": [{"match": "x", "tdp_w": float("nan"), "threads": 1}]
    },
    "a processor of any name": {"processors": [{"match": "", "tdp_w": 1, "threads": 1}]},
    "a wall meter that is none": {"wall_meter": 3},
    "a wall meter of no CPUs": {"wall_meter": {"idle_w": 1, "busy_w": 2, "busy_cpus": 0}},
    "a wall meter that is infinite": {
        "wall_meter": {"idle_w": 1, "busy_w": float("inf"), "busy_cpus": 1}
    },
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_are_bands_of_possible_numbers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(COEFFICIENTS[name]))
    said = greenvis("doctor", cwd=tmp_path, env={"GREENVIS_COEFFICIENTS": "mine.json"}, seconds=1)
    assert said.code == 2, said
    assert "mine.json" in said.err


def test_a_run_with_odd_coefficients_ends_with_2(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.json")
    for words in (("doctor",), ("track", "--", "true")):
        said = greenvis(*words, cwd=tmp_path, env={"GREENVIS_COEFFICIENTS": "mine.json"})
        assert said.code == 2, said
        assert "mine.json: it is a pipe" in said.err


def test_good_coefficients_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {"ram_w_per_gb": {**BAND, "citation": "a\x1b[31m"}, "version": "a\nb", "processors": []}
        )
    )
    table = load_coefficients(path)
    assert {k: table["ram_w_per_gb"][k] for k in BAND} == BAND
    assert "\x1b" not in table["ram_w_per_gb"]["citation"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where values stand, of a list the first alone."""
    yield at
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    )
    for key, one in inner:
        yield from places(one, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Return the value with another at one place."""
    out = copy.deepcopy(value)
    inside = out
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = new
    return out


RESULTS = json.loads((REPORTS / "quickstart" / "results.json").read_text())
WRONG = {
    "arms": [None, [], {}, 3, "x", {"a": {}}], "order": [None, [], ["a"], {}],
    "baseline": ["x", 3, [], {}], "metric": ["x", "", 3, None],
    "served": [0, -1, 1e300, None, "x"], "margin": [-1, None, "x"], "totals": [None, {}, []],
    "notes": [None, [3], "x"],
    "environment": [None, [], {}], "data": [None, 3], "sources": [[3], None], "newest_run_s": [None,
    -1, 1e18, "x"],
    "incomplete": [[3], None, [{}]], "family": [3, {}, {"members": 3, "links": []}],
    "crosscheck": [[{}], 3],
    "carbon_intensity": [[3], None], "pue": [["x"], None], "title": [3, []], "command": [3, {}],
    "recipe": [3, [3]],
}  # fmt: skip
WRONG_IN_ARM = {
    "seeds": [None, ["x"], 3], "status": ["x", None], "uses": [None, [3], [{}]], "accuracy": [None,
    3, {}, {"mean": "x"}],
    "train_energy_j": [None, {}, 3, {"value": "x"}], "inference_energy_j": [None, {}, []],
    "vs_baseline": [3, [], {"accuracy": 3}],
    "curve": [None, {"0": 3}, {"0": [[1]]}], "spent": [None, {}], "sci": [None, {}],
    "latency_ms": [3, {"p50": "x"}],
    "macs": [-1, "x", 1e300], "by_seed": [None, 3], "std": [None, {"wall_s": "x"}],
    "base_reuse": [3, {}, None],
    "techniques": [3, "x"],
    "energy_by_phase_j": [None, {"train": "x"}], "zones": [None, 3], "attempts": [None,
    {"done": "x"}],
}  # fmt: skip


def test_results_are_read_by_one_schema(tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "one"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("# One\n")
    arm = RESULTS["order"][1]
    odd = [(("arms", arm, key), value) for key, values in WRONG_IN_ARM.items() for value in values]
    odd += [((key,), value) for key, values in WRONG.items() for value in values]
    odd += [(at, value) for at in places(RESULTS) if isinstance(at[-1:],
    tuple) and at[-1:] == ("low",)
            for value in (float("nan"), float("inf"), 10**400)][:30]  # fmt: skip
    for at, value in odd:
        (folder / "results.json").write_text(json.dumps(changed(RESULTS, at, value)))
        with bounded(1), pytest.raises(BadInput, match=r"results\.json") as error:
            stored.read(folder / "results.json")
        assert len(str(error.value)) < 2000, at
    (folder / "results.json").write_text(json.dumps(changed(RESULTS, ("arms", arm, "macs"), "x")))
    for call in (
        lambda: overview(tmp_path / "reports"),
        lambda: compare(folder, folder),
        lambda: report(folder),
    ):
        with pytest.raises(BadInput, match=rf"results\.json.*arms\.{arm}\.macs"):
            call()
    assert greenvis("overview", cwd=tmp_path).code == 2


@pytest.mark.parametrize(
    "path", sorted(REPORTS.glob("*/results.json")), ids=lambda path: path.parent.name
)
def test_every_committed_report_is_read(path: Path) -> None:
    if "baseline" in json.loads(path.read_text()):
        assert stored.read(path).order


CELL = json.loads((REPORTS / "gpu" / "cells" / "tokens.json").read_text())
WRONG_IN_CELL: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("cell",): ("exits", 3, None, "x" * 5000), ("about",): (3, None), ("reason",): (None, [], {}),
    ("seconds",): (-1, float("nan"), "x", None, 1e300), ("rows",): (None, {}, 3, [3], [{}]),
    ("device",): (None, [], "x"), ("device", "name"): (3, None),
    ("device", "rehearsal"): ("x", None), ("device", "cpu"): (3, {}),
    ("device", "cpu", "allowed"): (-1, "x", 10**400), ("device", "versions"): (None, [], {"a": 3}),
    ("rows", 1, "setting"): (3, None), ("rows", 1, "energy_ratio"): (-1, "x", float("inf")),
    ("rows", 1, "low"): (None, "x"), ("rows", 1, "high"): (None, float("nan")),
    ("rows", 1, "ms"): ([], {}, 1e300, 10**400), ("rows", 1, "more"): ({"a": {"a": 1}}, [1]),
    ("rows", 1, "observed"): (3, [3], [{"wall_s": "x"}]),
}  # fmt: skip


def test_cells_of_the_gpu_bench_are_read_by_one_schema(tmp_path: Path) -> None:
    path = tmp_path / "out" / "cells" / "tokens.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(CELL))
    assert _stored.read_cell(path, "tokens") == CELL
    for at, value in [(at, value) for at, values in WRONG_IN_CELL.items() for value in values]:
        path.write_text(json.dumps(changed(CELL, at, value)))
        with pytest.raises(BadInput, match=r"tokens\.json.*remove it") as error:
            _stored.read_cell(path, "tokens")
        assert len(str(error.value)) < 2000, at
    path.unlink()
    os.mkfifo(path)
    before = everything(tmp_path)
    with pytest.raises(BadInput, match=r"tokens\.json"):
        gpu.run(tmp_path / "out", cells=["precision"])
    assert everything(tmp_path) == before


def test_ids_are_looked_up_past_what_is_no_record(tmp_path: Path) -> None:
    write(tmp_path / "renamed.jsonl", lines({"run": "20260101-abcdef"}))
    os.mkfifo(tmp_path / "pipe.jsonl")
    sparse(tmp_path / "sparse.jsonl")
    assert run_names.by_id("20260101-abcdef", tmp_path) == (
        "20260101-abcdef",
        [tmp_path / "renamed.jsonl"],
    )


@pytest.mark.parametrize(
    "raw", [b"", b"\xfd7zXZ\0", lzma.compress(b"x" * 100)[:-9], lzma.compress(bytes(300 * 2**20),
    preset=0),
            lzma.compress(archive.BETWEEN * 200_000, preset=0)],
    ids=["nothing", "a head", "cut off", "a bomb", "many records"],
)  # fmt: skip
def test_archives_are_unpacked_within_limits(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl.xz").write_bytes(raw)
    said = greenvis("report", ".", "--out", "out", cwd=tmp_path)
    assert said.code == 2, said
    assert "records.jsonl.xz" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe",
    ["", "[]", "data: 3", "a: &a [*a]", "[" * 3000, "!!python/name:os.system", "data: [1]"],
)
def test_the_recipe_in_a_card_is_read_within_limits(recipe: str) -> None:
    card = {"recipe": recipe, "file": "model.safetensors", "data": {"train": 1, "classes": 1}}
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        probe._source(card, {"arms": {}})


def test_the_recipe_in_a_record_is_read_within_limits(tmp_path: Path) -> None:
    for i, text in enumerate(
        (
            "a: &a [*a]",
            "[" * 5000,
            "\x1b",
            "report: 3",
            "report: {margin: x, title: [1]}",
            "2026-13-45",
        )
    ):
        path = write(tmp_path / str(i) / "a.jsonl", lines({"recipe": text}))
        out = report(path, out=tmp_path / str(i) / "reports" / "one")
        overview(out.parent.parent)
