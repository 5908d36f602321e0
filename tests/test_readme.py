"""The README is true: its commands, its table of techniques, its links."""

from __future__ import annotations

import json
import re
from pathlib import Path

from greenvis import registry
from greenvis.cli import _parser, _verbs
from greenvis.recipe import load_recipe
from greenvis.report import verdict

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_table_of_techniques_is_the_registry() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", TEXT, re.M))
    does = {name: " ".join((registry.find(name).__doc__ or "").split("\n\n")[0].split()) for name in registry.names()}
    assert rows == does


def test_every_command_named_exists() -> None:
    commands = set(re.findall(r"(?:`|^)greenvis ([a-z]+)\b", TEXT, re.M))
    assert commands
    assert commands <= set(_verbs(_parser()))


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
    for path in sorted((ROOT / "reports").glob("*/results.json")):
        found = json.loads(path.read_text())
        if "baseline" in found:
            assert verdict.opening(found) in TEXT, f"README: {path.parent.name} says {verdict.opening(found)}"
        assert f"(reports/{path.parent.name}/report.md)" in TEXT
