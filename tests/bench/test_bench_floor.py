"""What benchmarks say of their joules: two figures, and the noise floor beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from greenvis.bench import (
    _floor,
    advise,
    dense_fusion,
    exits,
    image_tokens,
    kv_cache,
    rank,
    structure,
    tokens,
    tune,
)
from greenvis.bench.gpu import _page

ROOT = Path(__file__).parents[2]
PAGES = {
    "bench-dense-fusion": dense_fusion,
    "bench-exits": exits,
    "bench-image-tokens": image_tokens,
    "bench-kv-cache": kv_cache,
    "bench-structure": structure,
    "bench-tokens": tokens,
    "bench-tune": tune,
}
COMMITTED = [name for name in PAGES if (ROOT / "reports" / name).exists()]
WITH_JOULES = ("advice", "bench-rank", "gpu", *COMMITTED)
BAND = {"low": 0.9, "high": 1.2, "citation": "measured on this machine: 24 runs"}


@pytest.mark.parametrize(
    ("equal", "apart"),
    [([1.0], 1.0), ([0.8, 1.1], 1.25), ([1.2, 0.9], 1.2), ([None, 1.5], 1.5), ([], None)],
)
def test_the_floor_is_the_furthest_apart_either_way(
    equal: list[float | None], apart: float | None
) -> None:
    assert _floor.ratio(equal) == (None if apart is None else pytest.approx(apart))


def test_the_sentence_says_how_the_floor_is_known() -> None:
    assert "×1.25, by which a and b read apart" in _floor.sentence(1.25, "a and b")
    assert "not measured then" in _floor.sentence(None)
    assert "×0.900–1.20" in _floor.sentence(None, repeatability=BAND)
    assert BAND["citation"] in _floor.sentence(None, repeatability=BAND)


def test_this_machines_band_is_kept_with_the_figures() -> None:
    band = _floor.repeatability()
    assert 0 < band["low"] <= 1 <= band["high"]
    assert band["citation"]
    json.dumps(band)


def test_joules_have_two_figures_and_nothing_is_a_dash() -> None:
    lines = _floor.table([{"a": "x", "energy_j": 0.4181, "energy_ratio": 0.915, "more": None}])
    assert lines[2] == "| x | 0.42 | 0.92 | – |"


@pytest.mark.parametrize("name", WITH_JOULES)
def test_committed_pages_are_those_of_their_results_and_have_a_floor(name: str) -> None:
    folder = ROOT / "reports" / name
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "report.md").read_text()
    if name == "advice":
        written = advise._markdown(results)
    elif name == "bench-rank":
        written = rank._report(results)
    elif name == "gpu":
        written = _page.markdown(results)
    else:
        written = PAGES[name]._markdown(results, Path("reports") / name)
    machine = re.compile(r"on \d+ logical CPUs")  # of whoever words it
    assert machine.sub("", page) == machine.sub("", written)
    assert "Noise floor of energies: " in page


def test_no_other_benchmark_tells_joules() -> None:
    """A new one must say its floor, too."""
    for path in (ROOT / "reports").glob("*/results.json"):
        results = json.loads(path.read_text())
        if "baseline" not in results and path.parent.name not in WITH_JOULES:
            assert "energy_j" not in json.dumps(results), path


def test_what_saves_less_than_equal_settings_differ_saved_nothing_on_a_gpu() -> None:
    def cell(never: float) -> dict[str, object]:
        rows = [
            {"setting": setting, "batch": 8, "energy_ratio": ratio, "low": ratio, "high": ratio}
            for setting, ratio in (("unmodified", 1.0), ("never", never), ("70% leave", 0.92))
        ]
        return {"cell": "exits", "rows": rows}

    quiet, noisy = ("\n".join(_page._verdicts([cell(never)])) for never in (0.99, 1.1))
    saved = "- exits: 70% leave (batch 8) ×0.92"
    assert quiet.index(saved) < quiet.index("**Neither**")
    assert noisy.index(saved) > noisy.index("**Neither**")
    assert "×1.10" in noisy
