"""The README is true: its commands, its table of techniques, its links."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from readme import BEGIN, END, measured, techniques

from greenvis.cli.main import app
from greenvis.experiment.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_table_of_techniques_is_the_registry() -> None:
    (table,) = re.findall(r"^\| name \| what it does \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT, re.M)
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M)) == techniques(), "make readme"


def test_every_command_named_exists() -> None:
    commands = set(re.findall(r"(?:`|^)greenvis ([a-z]+)\b", TEXT, re.M))
    assert commands
    assert commands <= set(typer.main.get_command(app).commands)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", TEXT))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_the_recipe_shown_is_valid(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    recipe = load_recipe(path)
    assert recipe.arm("lora").needs() == ["run:quickstart-base"]
    assert (ROOT / "recipes/quickstart-base.yaml").exists()


def test_what_was_measured_is_what_the_reports_say() -> None:
    assert TEXT.split(BEGIN)[1].split(END)[0] == measured(), "make readme"
