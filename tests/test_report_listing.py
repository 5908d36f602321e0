"""Listing, comparing and gating runs; the quick reader against the whole one; ten thousand runs
(slow)."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import synthetic

from greenvis.errors import BadInput
from greenvis.meters import pricing, record
from greenvis.report import report, results
from greenvis.report.listing import compare, diff, group, ls, quick


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.study(tmp_path_factory.mktemp("runs"))


def test_quick_reading_is_reading(study: Path, tmp_path: Path) -> None:
    cut = synthetic.write(tmp_path, "cut")
    cut.write_bytes(cut.read_bytes()[:-200])
    noisy = synthetic.write(tmp_path, "noisy", accuracy=0.5)
    noisy.write_bytes(
        b"\n\xff\n" + noisy.read_bytes().replace(b'"phase":"eval"', b'"phase":"ev\\u0061l"', 1)
    )
    for path in record.find([study, tmp_path]):
        (fast, left_out), whole = quick(path), record.read(path)
        assert left_out == []
        assert fast.totals == whole.totals
        assert fast.facts == whole.facts
        assert (fast.status, fast.id) == (whole.status, whole.id)
        assert pricing.run_energy(fast) == pricing.run_energy(whole)
    (tmp_path / "no.jsonl").write_text("[]\n{}\n")
    with pytest.raises(BadInput, match="no header line"):
        quick(tmp_path / "no.jsonl")


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
    assert by_arm["diverged"]["accuracy"] is None
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


def test_four_hundred_runs_are_all_there(tmp_path: Path) -> None:
    """How long ten thousand take is `greenvis bench listing`."""
    synthetic.many(tmp_path / "runs", 100, 4)
    assert len(ls(tmp_path / "runs")) == 400
    found = results(tmp_path / "runs")
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
