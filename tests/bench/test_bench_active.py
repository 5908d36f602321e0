"""The benchmark of BADGE: both tools choose, and what is said follows from what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from greenvis.bench import active
from greenvis.errors import BadInput

SMALL = {"candidates": 60, "features": 8, "classes": 4, "budget": 5, "rounds": 1}


def test_both_choose_and_the_page_says_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("skactiveml")
    result = active.run(**SMALL, out=tmp_path)
    ours, theirs = result["rows"]
    assert (ours["tool"], theirs["tool"]) == ("greenvis", "scikit-activeml")
    assert ours["faster"] == pytest.approx(theirs["cpu_s"] / ours["cpu_s"], abs=0.1)
    assert result["difference"] < 1e-5
    page = (tmp_path / "report.md").read_text()
    assert ("are met" in page) == ours["met"]
    assert (tmp_path / "results.json").is_file()


def test_without_the_peer_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skactiveml.pool", None)
    with pytest.raises(BadInput, match=r"greenvis\[bench\]"):
        active.run(**SMALL)
