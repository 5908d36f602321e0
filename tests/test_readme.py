"""README and docs are true: their commands, recipe and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from greenvis.cli.main import app
from greenvis.experiment.recipe import load_recipe
from greenvis.techniques import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TEXT = (ROOT / "README.md").read_text()
MOST_BYTES = 10_000  # of the README: read in one sitting
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pages
def test_every_command_named_exists(page: Path) -> None:
    commands = set(re.findall(r"(?:`|^)greenvis ([a-z][a-z-]*)", page.read_text(), re.M))
    assert commands <= set(typer.main.get_command(app).commands)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    made = {f"{name}.md" for name in registry.names()}  # cards, and the reference: by the build
    there = lambda path: path.exists() or path.name in made or path.parent.name == "reference"  # noqa: E731
    assert [link for link in links if not there(page.parent / link)] == []


def test_the_readme_is_short_and_leads_to_the_pages() -> None:
    assert len(TEXT.encode()) < MOST_BYTES
    links = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", TEXT)}
    for name in ("start", "which", "use", "data", "energy", "reading", "measured"):
        assert DOCS / f"{name}.md" in links


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [p for p in PAGES[1:] if f" {p.relative_to(DOCS).as_posix()}\n" not in menu] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", TEXT))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_techniques_it_names_exist() -> None:
    (table,) = re.findall(r"^\| you have .*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.M)
    rows = [row.split(" | ") for row in table.splitlines()]
    assert len(rows) == 10
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    known = set(registry.names())
    assert len(named) > 10
    assert named <= known


def test_the_recipe_shown_is_valid(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    recipe = load_recipe(path)
    assert recipe.arm("lora").needs() == ["run:quickstart-base"]
    assert (ROOT / "recipes/quickstart-base.yaml").exists()
