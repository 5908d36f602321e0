"""Run records are packed beside their report, small enough to be committed, and are read back to
the same results."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
import synthetic

from greenvis.cli.main import main
from greenvis.errors import BadInput
from greenvis.meters import record
from greenvis.report import archive, report, results
from greenvis.report.results_file import to_json


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with a crash, an older version, a run that failed: all of it must come back."""
    return synthetic.study(tmp_path_factory.mktemp("runs"))


def test_a_reports_folder_gives_the_results_its_records_gave(study: Path, tmp_path: Path) -> None:
    folder = report(study, out=tmp_path / "out").parent
    assert (folder / archive.NAME).stat().st_size <= archive.MOST
    assert to_json(results(folder)) == to_json(results(study))
    assert to_json(results(folder / archive.NAME)) == to_json(results(study))
    assert (
        results(folder, grid=50.0).as_json()["arms"]["lora"]["carbon_g"]
        == results(study, grid=50.0).as_json()["arms"]["lora"]["carbon_g"]
    )
    assert str(study) not in lzma.decompress((folder / archive.NAME).read_bytes()).decode()


def test_a_report_made_again_from_its_folder_is_the_same_and_keeps_its_records(
    study: Path, tmp_path: Path
) -> None:
    folder = report(study, out=tmp_path / "out", title="Study", note="so it was").parent
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert main(["report", str(folder), "--out", str(folder), "--title", "Study", "--json"]) == 0
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert after[archive.NAME] == before[archive.NAME]
    assert json.loads(after["results.json"])["arms"] == json.loads(before["results.json"])["arms"]
    report(folder / "results.json")  # put into words anew, in its own place
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before | {
        name: (folder / name).read_bytes() for name in ("index.html", "report.md", "results.json")
    }


def test_results_alone_are_compared_anew(study: Path, tmp_path: Path) -> None:
    folder = report(study, out=tmp_path / "out").parent
    (folder / archive.NAME).unlink()
    typed = results(folder)
    again = typed.as_json()
    assert to_json(typed) == to_json(results(study))
    other = results(folder, baseline="lora", margin=5.0, served=10.0).as_json()
    assert (other["baseline"], other["order"][0], other["margin"]) == ("lora", "lora", 5.0)
    fresh = results(study, baseline="lora", margin=5.0, served=10.0).as_json()
    for arm in fresh["arms"]:
        assert other["arms"][arm]["vs_baseline"] == fresh["arms"][arm]["vs_baseline"]
        assert other["arms"][arm]["full_cycle"] == fresh["arms"][arm]["full_cycle"]
    for options, says in (
        ({"grid": "SWE"}, "wants run records"),
        ({"metric": "loss"}, "wants run records"),
        ({"baseline": "lorra"}, "did you mean 'lora'"),
    ):
        with pytest.raises(BadInput, match=says):
            results(folder, **options)
    stale = {**again, "schema": 1}
    (folder / "results.json").write_text(json.dumps(stale))
    with pytest.raises(BadInput, match="make the report again from its run records"):
        results(folder)


def _long(folder: Path, seed: int, lines: int) -> dict[str, Any]:
    """Write a record with so many samples between two logs, of figures that do not compress."""
    path = synthetic.write(folder, "long", seed)
    text = path.read_text().splitlines()
    head, tail = text[:3], text[3:]
    rng, rows = random.Random(seed), []
    for i in range(lines):
        rows.append(
            f'{{"type":"sample","phase":"train/epoch0","wall_s":{i + rng.random()},"cpu_s":{i + rng.random()}}}'
        )
    path.write_text("\n".join([*head, *rows, *tail]) + "\n")
    return {"path": path, "size": path.stat().st_size}


@pytest.mark.slow
def test_records_too_large_lose_what_later_totals_replace_and_no_joule(tmp_path: Path) -> None:
    for seed in range(2):
        _long(tmp_path / "runs", seed, 15_000)
    whole = lzma.compress(b"".join(p.read_bytes() for p in record.find([tmp_path / "runs"])))
    assert len(whole) > archive.MOST
    folder = report(tmp_path / "runs", out=tmp_path / "out").parent
    assert (folder / archive.NAME).stat().st_size <= archive.MOST
    kept, made = (
        results(folder).as_json()["arms"]["long"],
        results(tmp_path / "runs").as_json()["arms"]["long"],
    )
    assert kept["train_energy_j"] == made["train_energy_j"]
    assert kept["curve"] == made["curve"]


def test_what_is_still_too_large_loses_digits_below_a_millionth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = _long(tmp_path / "runs", 0, 300).values()
    lines = path.read_text().splitlines()
    logged = '{"type":"log","phase":"train/epoch0","epoch":0.1234567891,"loss":0.000000012}'
    path.write_text("".join(f"{line}\n{logged}\n" for line in lines))
    thin = lzma.compress(archive.BETWEEN + archive._thin(path.read_bytes()), preset=6)
    monkeypatch.setattr(archive, "MOST", len(thin) - 100)
    packed = archive.pack([tmp_path / "runs"])
    assert packed is not None
    assert packed.rounded
    text = lzma.decompress(packed.content).decode()
    assert '"epoch":0.123457,"loss":0.000000}' in text
    facts = [line for line in lines if line.startswith('{"type":"fact"')]
    assert facts
    assert all(line in text for line in facts)  # what one image took is a millionth
    (tmp_path / archive.NAME).write_bytes(packed.content)
    kept, made = (results(tmp_path / name).as_json() for name in (archive.NAME, "runs"))
    for key in ("train_energy_j", "inference_energy_j"):
        assert kept["arms"]["long"][key]["value"] == pytest.approx(
            made["arms"]["long"][key]["value"], rel=1e-6
        )
    page = report(tmp_path / "runs", out=tmp_path / "report")
    written = json.loads((page.parent / "results.json").read_text())
    assert written["arms"] == results(page.parent).as_json()["arms"]  # of the records beside it


ROOT = Path(__file__).parents[2] / "reports"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", sorted(p.parent.name for p in ROOT.glob(f"*/{archive.NAME}")))
def test_committed_records_give_their_reports_figures(name: str) -> None:
    """Anybody can price the evidence anew."""
    folder = ROOT / name
    assert (folder / archive.NAME).stat().st_size <= archive.MOST
    told = json.loads((folder / "results.json").read_text())
    again = results(folder / archive.NAME).as_json()
    if "arms" not in told:  # a benchmark's: each base, fine-tuned
        tuned = [row["accuracy"]["mean"] for row in again["arms"].values()]
        for row in told["rows"]:
            assert pytest.approx(row["tuned_accuracy"]) in tuned
        return
    assert list(again["arms"]) == list(told["arms"])
    for arm, row in told["arms"].items():
        assert again["arms"][arm][told["metric"]] == row[told["metric"]]
        for key in ("train_energy_j", "train_energy_with_reuse_j", "inference_energy_j"):
            value = again["arms"][arm][key]["value"]
            assert value == pytest.approx(row[key]["value"], rel=1e-5), (arm, key)


def test_what_does_not_fit_is_not_packed_and_the_report_says_so(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST", 100)
    folder = report(study, out=tmp_path / "out").parent
    assert not (folder / archive.NAME).exists()
    assert "run records are not beside them" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no archive", "not an archive of run records"),
        (lzma.compress(b'{"type":"record"}\n' + b"x" * 1000)[:-20], "cut off"),
        (lzma.compress(b"\0" * (1 << 16)), "unpacks to more than"),
        (lzma.compress(b'{"type":"record"}\n{"type":"note"}\n'), "no run record"),
    ],
)
def test_a_broken_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, says: str
) -> None:
    monkeypatch.setattr(archive, "MOST_READ", 1 << 15)
    (tmp_path / archive.NAME).write_bytes(content)
    with pytest.raises(BadInput, match=says):
        results(tmp_path)
