"""How far the same work reads apart on this machine: measured, stored, in the bands of records, and
said in reports."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.cli import main as cli
from greenvis.meters import record, repeat
from greenvis.meters.coefficients import COEFFICIENTS
from greenvis.meters.doctor import doctor
from greenvis.meters.energy import Meter
from greenvis.meters.host import cpu_name

DEFAULT = json.loads(COEFFICIENTS.read_text())["repeatability"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def _measure(*values: float, hours_ago: float = 0.0, processor: str | None = None) -> None:
    """Measure work that takes these CPU seconds, and put all readings so far that many hours
    back."""
    taken = iter((9.9, *values))  # the first is no reading
    repeat.measure(
        cpu_name() if processor is None else processor, len(values), 0.0, lambda: next(taken)
    )
    held = json.loads(repeat.path().read_text())
    held["readings"] = [[at - 3600 * hours_ago, value] for at, value in held["readings"]]
    repeat.path().write_text(json.dumps(held))


def _band() -> dict[str, float]:
    return {
        k: round(v, 3)
        for k, v in repeat.band(cpu_name(), DEFAULT).items()
        if k in ("low", "central", "high")
    }


def test_readings_of_two_days_make_the_band() -> None:
    _measure(1.0, 1.0, 1.1, hours_ago=30)
    _measure(1.0, 1.2, 0.9)
    assert _band() == {"low": 0.9, "central": 1.0, "high": 1.2}
    assert (
        "measured on this machine: 6 runs over 30 h read ×1.33 apart"
        in repeat.band(cpu_name(), DEFAULT)["citation"]
    )


@pytest.mark.parametrize(
    ("values", "low", "high"), [((1, 1, 1, 1, 1.01), 0.56, 1.78), ((1, 1, 1, 0.5, 3), 0.5, 3.0)]
)
def test_one_sitting_narrows_nothing(values: tuple[float, ...], low: float, high: float) -> None:
    _measure(*values)
    assert _band() == {"low": low, "central": 1.0, "high": high}
    assert "default, for 12 h must lie between runs" in repeat.band(cpu_name(), DEFAULT)["citation"]


def test_few_readings_of_another_processor_or_none_leave_the_default() -> None:
    assert repeat.band(cpu_name(), DEFAULT) is DEFAULT
    _measure(1.0, 2.0, 1.0, 1.0)
    assert repeat.band(cpu_name(), DEFAULT) is DEFAULT
    _measure(1.0, 2.0, 1.0, 1.0, 5.0, processor="another")
    assert repeat.band(cpu_name(), DEFAULT) is DEFAULT


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"processor": 1}', '{"readings": [[1, 2, 3]]}', "[" * 9000, "\x00"]
)
def test_a_file_gone_bad_leaves_the_default(text: str) -> None:
    repeat.path().parent.mkdir(parents=True)
    repeat.path().write_text(text)
    assert repeat.band(cpu_name(), DEFAULT) is DEFAULT
    held = {
        "processor": cpu_name(),
        "cpus": repeat.host.cpus(),
        "readings": [[1e9, -1.0], [1e9, 1e999], [1e9, 0.0]] * 9,
    }
    repeat.path().write_text(json.dumps(held))
    assert repeat.band(cpu_name(), DEFAULT) is DEFAULT


def test_doctor_measures_real_work_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repeat.measure, "__defaults__", (3, 0.0, *repeat.measure.__defaults__[2:]))
    assert cli.main(["doctor", "--repeat"]) == 0
    assert "default" in capsys.readouterr().out
    values = [value for _, value in json.loads(repeat.path().read_text())["readings"]]
    assert len(values) == 3
    assert all(value > 0 for value in values)
    _measure(*itertools.repeat(values[0], 5), hours_ago=24)
    _measure(values[0])
    (row,) = (r for r in doctor() if r["what"] == "repeatability")
    assert row["provenance"] == "measured"


@pytest.mark.parametrize("known", [True, False])
def test_a_record_prices_with_it_and_its_report_says_which(known: bool, tmp_path: Path) -> None:
    if known:
        _measure(1.0, 1.0, 1.25, hours_ago=30)
        _measure(1.0, 0.8)
    estimated = [c for c in Meter().components if c["source"] == "cpu-time model"]
    if not estimated:
        pytest.skip("a counter tells the energy here, and nothing is estimated")
    with gv.track("it", dir=tmp_path / "runs", country="FRA") as run:
        sum(i * i for i in range(300_000))
    bands = {c["name"]: c.get("repeatability") for c in record.read(run.path).header["components"]}
    assert bands["cpu"]["high"] == pytest.approx(1.25 if known else 1.78)
    text = (gv.report([tmp_path / "runs"], out=tmp_path / "out").parent / "report.md").read_text()
    (said,) = re.findall(r"- Bands hold how far the same work reads apart.*", text)
    assert ("×0.8–1.25, measured on this machine: 5 runs over 30 h" in said) == known
    assert ("×0.56–1.78, Identical" in said) == (not known)
