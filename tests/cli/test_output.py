"""Tables: whole in a file, folded at words where a terminal is narrow, and refused where no
terminal could show them."""

from __future__ import annotations

import pytest

from greenvis.cli.output import MOST_COLUMNS, print_rows

ROWS = [{f"images_per_second_{i}": 1234.5 + i for i in range(9)}]


def test_a_file_gets_every_heading_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_rows(ROWS, "speed")
    assert any(
        all(f"images per second {i}" in line for i in range(9))
        for line in capsys.readouterr().out.splitlines()
    )


def test_a_narrow_terminal_breaks_at_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    print_rows(ROWS, "speed")
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 90
    assert shown.count("images") == shown.count("second") == 9
    assert "1242.5" in shown


def test_what_no_terminal_shows_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{f"c{i}": i for i in range(MOST_COLUMNS + 1)}], "wide")
    assert (
        capsys.readouterr().out
        == "wide: 1 rows of 17 columns, too wide to print; --json has them, --out a report\n"
    )
