"""The site: every public name, technique, command and recipe field is on it, and it builds with strict links."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import greenvis
from greenvis.cli.main import app
from greenvis.techniques import registry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/_hooks"))
import notebooks  # noqa: E402
import pages  # noqa: E402
import pretexts  # noqa: E402

MANUAL = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FIGURE = r"[+−]?\d[\d.]*(?: to [+−][\d.]+|–[\d.]+| J| %)?"
needs_mkdocs = pytest.mark.skipif(
    not (importlib.util.find_spec("material") and importlib.util.find_spec("mkdocstrings")),
    reason="MkDocs is not installed: pip install 'greenvis[docs]'",
)


def test_every_public_name_is_in_the_reference() -> None:
    text = pages.public_functions() + pages.public_techniques()
    headings = re.findall(r"^ +heading: greenvis\.(\w+)$", text, re.M)
    assert sorted(headings) == sorted(greenvis.__all__)


def test_what_else_the_reference_names_exists() -> None:
    for path in re.findall(r"^::: (\S+)$", pages.public_functions(), re.M):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("name", registry.names())
def test_every_technique_has_a_card(name: str) -> None:
    text = pages.card(name)
    for part in ("## Settings", "## What it goes with", "## What was measured", "## Recipes"):
        assert f"\n{part}\n" in text
    for field in registry.about(name)["schema"].get("properties", {}):
        assert f"| `{field}` |" in text
    rows = pages.measured_of(name)
    assert (pages.NOT_MEASURED in text) == (not rows)
    assert all(f"reports/{Path(row['measured in']).parent.name}/" in text for row in rows)
    assert ("frontier of plain training is not known" in text) == (not rows)
    assert ("| beside plain training |" in text) == bool(rows)
    for row in rows:  # of an arm inside the frontier its card says when it would not be
        inside = "inside the frontier" in row["beside plain training"]
        assert inside == ("; outside it with less than" in row["beside plain training"])
    effect = " ".join(registry.about(name)["doc"].partition("\n\n")[0].split())
    assert f"**{effect}**" in text


def test_typical_savings_are_those_of_the_reports() -> None:
    said = pages.typical("linear_probe", "partial")
    arms = len(pages.measured_of("linear_probe")) + len(pages.measured_of("partial"))
    spread = r"×[\d.]+ \(×[\d.]+ to ×[\d.]+\)"
    parts = f"base and teacher included {spread}; own training {spread}; per image ×"
    assert re.match(parts, said)
    assert f"; {arms} arms of " in said
    assert pages.typical("no_technique") == "not measured"


PRETEXTS = ("simclr", "moco", "byol", "vicreg", "dino", "mae")


def test_the_table_of_pretexts_is_what_their_report_measured() -> None:
    text = pretexts.committed()
    results = json.loads((ROOT / "reports/pretexts-fashion/results.json").read_text())
    arms, base = results["arms"], results["baseline"]
    rows = {cells[1].strip(): cells for cells in _rows(text) if len(cells) == 8}
    assert set(rows) == {"", "---", base, *PRETEXTS}
    for name in PRETEXTS:
        _, _, _, times, accuracy, points, neighbours, _ = rows[name]
        tuned = arms[f"{name}-40"]
        mean = statistics.mean(tuned["accuracy"]["by_seed"].values())
        assert accuracy.startswith(f" {100 * mean:.1f} % (")
        own = statistics.mean(arms[name]["accuracy"]["by_seed"].values())
        assert neighbours.startswith(f" {100 * own:.1f} % (")
        difference = 100 * (mean - statistics.mean(arms[base]["accuracy"]["by_seed"].values()))
        assert points.replace("−", "-").startswith(f" {difference:+.1f} (")
        joules = [
            statistics.mean(arms[a]["train_energy_with_reuse_j"]["by_seed"].values())
            for a in (f"{name}-40", base)
        ]
        assert float(times.split("×")[1].split()[0]) == pytest.approx(
            joules[0] / joules[1], abs=0.03
        )
    guide = (ROOT / "docs/guides/few-labels.md").read_text()
    assert "\n{{ pretexts }}\n" in guide


def test_what_to_take_follows_the_intervals() -> None:
    results = json.loads((ROOT / "reports/pretexts-fashion/results.json").read_text())
    arms = results["arms"]
    for name in PRETEXTS:
        arms[f"{name}-40"]["vs_baseline"]["accuracy"] |= {"low": -0.2, "high": -0.1}
    assert f"no pretext is shown to do better than {results['baseline']}" in pretexts.table(results)
    better = arms["byol-40"]
    better["vs_baseline"]["accuracy"] |= {"low": 0.01, "high": 0.1}
    better["accuracy"]["by_seed"] = dict.fromkeys(better["accuracy"]["by_seed"], 0.99)
    better["train_energy_with_reuse_j"]["value"] = 1.0
    text = pretexts.table(results)
    assert "byol are shown to do better" in text
    taken = [cells[3].strip() for cells in _rows(text) if cells[1].strip() == "40"]
    assert taken == ["byol-40"], "the cheapest and best leaves no other to take"


def _rows(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.splitlines() if line.startswith("|")]


def test_every_command_and_option_is_listed() -> None:
    text = pages.commands()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        if not hasattr(command, "commands"):
            assert f"### greenvis {name}\n" in text
            for param in command.params:
                assert param.opts[0] in text


def test_every_field_of_a_recipe_is_listed() -> None:
    text = pages.recipe_fields()
    for field in ("name", "frontier", "epochs", "unlabeled", "batch_size", "rounds"):
        assert f"| `{field}` |" in text
    assert "| `segmentation` |" in text


def test_extending_tells_of_every_door() -> None:
    text = pages.extending()
    for check in ("technique", "dataset", "meter_source", "task", "section"):
        assert f"greenvis.testing.check_{check}(" in text
    assert "## House rules" not in text


def test_the_guide_has_ten_rows_and_names_what_there_is() -> None:
    text = (ROOT / "docs/which.md").read_text()
    (table,) = re.findall(r"^\| you have, .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    rows = table.splitlines()
    assert len(rows) == 10
    named = set(re.findall(r"`(\w+)`", text)) & set(registry.names())
    assert len(named) > 20
    for names in re.findall(r"\{\{ typical: ([\w, ]+) \}\}", text):
        assert {n.strip() for n in names.split(",")} <= set(registry.names())


def test_the_answers_of_the_ten_second_test_are_on_the_first_screens() -> None:
    text = (ROOT / "docs/reading.md").read_text().partition("## The ten-second test")[2]
    head, _, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    assert len(rows) == 4
    for column in range(1, len(head)):
        (path,) = re.findall(r"\]\((.+?)\)", head[column])
        first = (ROOT / "docs" / path).read_text().partition("## Arms")[0].replace("\u00a0", " ")
        for row in rows:
            figures = re.findall(FIGURE, row[column])
            assert [f for f in figures if f not in first] == [], (path, row[0])
            names = set(re.findall(r"lora(?:-\w+)?|scratch|cumulative|last3", row[column]))
            assert all(name in first for name in names)


def test_recipes_that_pages_name_exist() -> None:
    for page in MANUAL:
        for name in re.findall(r"`(recipes/[\w/.-]+\.yaml)`", (ROOT / "docs" / page).read_text()):
            assert (ROOT / name).exists(), (page, name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_without_what_it_printed(path: Path) -> None:
    kinds = [kind for kind, _ in notebooks.cells(path)]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 3
    assert '"outputs": []' in path.read_text()
    assert re.findall(r'"outputs": \[[^\]]', path.read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path) -> None:
    printed = notebooks.outputs(path)
    assert any(printed)
    text = "\n".join(printed)
    assert "J (" in text or "MMACs" in text


def test_a_cell_may_hold_a_command_and_shows_its_last_value(tmp_path: Path) -> None:
    texts = ("a = 1", "!greenvis explain ncm", "a + 1")
    cells = [{"cell_type": "code", "source": [text]} for text in texts]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    first, second, third = notebooks.execute(tmp_path / "x.ipynb")
    assert (first, third) == ("", "2\n")
    assert second.startswith("ncm (stage ")
    with pytest.raises(SystemExit, match="exit code 2"):
        notebooks._execute("!greenvis explain nothing", {})


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in registry.names():
        assert (tmp_path / f"techniques/{name}.html").exists()
    reference = "".join(
        (tmp_path / f"reference/{page}.html").read_text() for page in ("functions", "techniques")
    )
    missing = [name for name in greenvis.__all__ if f'id="greenvis.{name}"' not in reference]
    assert missing == []
    for method in ("loss", "step_end", "served", "save", "load", "use", "undo"):
        assert f'id="greenvis.Wrapped.{method}"' in reference
    assert "lora" in (tmp_path / "search/search_index.js").read_text()
    remote = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="?https?://(?!example)')
    assert [p.name for p in tmp_path.glob("*.html") if remote.search(p.read_text())] == []
    _search_from_a_file(tmp_path)


def _search_from_a_file(site: Path) -> None:
    """What a reader who opened the folder without a server finds."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    page = f"file://{site}/index.html?q=distill"
    done = subprocess.run(
        [browser, *flags, "--dump-dom", page], capture_output=True, text=True, check=True
    )
    assert re.search(r"\d+ matching documents", done.stdout)
