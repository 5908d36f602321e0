"""One hostile name through every place where a name is shown: it stays text, on its line, in its
cell."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import synthetic
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from greenvis import errors
from greenvis.bench.gpu import _page
from greenvis.cli import output
from greenvis.cli.main import main
from greenvis.planning import candidates
from greenvis.report import exports, results
from greenvis.report.markup import code, link, md

GPU = Path(__file__).parents[2] / "reports" / "gpu"
FORGED = "greenvis: all is well"
HOSTILE = (
    "=1+1|<script>alert(1)</script>[x](javascript:alert(1))`id`\x1b[31m\x9b2J\u202e\\\r\n# "
    f"head\n{FORGED}\n"
    "| a | b |\0$(id) <!-- </pre> ]]> &amp; https://evil.example @someone ''' \"\"\" \u2028end"
)
SHOWN = "alert(1)"  # of it, what every sink still shows


def safe_lines(text: str) -> None:
    """A terminal: no control character, and no line that a name began."""
    assert [c for c in text if not c.isprintable() and c not in f"\n{JOINER}"] == []
    assert not re.search(rf"^({re.escape(FORGED)}|# head)", text, re.MULTILINE)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", {"": data}))


TAGS = """\
html head meta title link style body a header p h1 h2 h3 nav main section ul li span b div table caption thead tbody tr th td
figure figcaption pre code strong em br img ol details summary dl dt dd button script"""
DRAWN = "svg desc g path defs use rect text clippath tspan marker line polyline circle image"
OURS, JOINER = {*TAGS.split(), *DRAWN.split()}, "\N{WORD JOINER}\N{NO-BREAK SPACE}"


def safe_html(text: str) -> None:
    """HTML: tags of ours alone, none that runs, links to files beside it alone, no control
    character."""
    tags = _Tags()
    tags.feed(text)
    assert {tag for tag, _ in tags.seen} <= OURS
    assert [attrs for tag, attrs in tags.seen if tag == "script"] in ([], [{}])
    for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL):  # ours, by its hash
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in text
        assert SHOWN not in script
    for _, attrs in tags.seen:
        assert not [name for name in attrs if name.startswith("on")]
        target = attrs.get("href") or attrs.get("src") or ""
        assert re.fullmatch(
            r"(#|data:,|figures/|exports/|reports/|\.\./|[\w.%-]+/)?[\w.%/-]*", target
        ), target
    assert [c for c in text if not c.isprintable() and c not in f"\n\t{JOINER}"] == []


def safe_markdown(text: str, rows: int) -> None:
    """Markdown: rendered, the HTML is safe, and tables have as many cells as their heads."""
    front = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(front)
    safe_html(html)
    assert SHOWN in re.sub(r"<[^>]*>", "", html).replace("\\", "")
    tables = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert sum(table.count("<tr>") for table in tables) >= rows
    assert not re.search(r"<(h\d)>head", html)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with records whose every word is hostile, and the report on them, made by the
    command."""
    base = tmp_path_factory.mktemp("sinks")
    source = {**synthetic.CPU, "source": HOSTILE, "citation": HOSTILE, "reason": HOSTILE}
    header = {
        "components": [source], "host": HOSTILE, "command": ["python", HOSTILE], "git": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "carbon_intensity": {**synthetic.WORLD, "zone": HOSTILE, "source": HOSTILE},
        "baseline": "plain",
        "cpu": {"name": HOSTILE, "logical": 2},
    }  # fmt: skip
    facts = {
        "recipe": f"```\n</pre>{HOSTILE}", "data": {"name": HOSTILE}, "task_accuracy": [[0.9, 0.1],
        [0.5, 0.8]],
        "codecarbon": {"energy_j": 1.0, "mode": HOSTILE}, "model": {"ref": HOSTILE,
        "options": {HOSTILE: HOSTILE}},
        "latency_ms": {"p50": 1.0, HOSTILE: 1.0},
    }  # fmt: skip
    for seed in range(2):
        plain = facts | {"techniques": []}
        synthetic.write(base / "runs", "plain", seed, name=HOSTILE, header=header, facts=plain)
        for arm in (HOSTILE, f"@{HOSTILE}", f"\t+{HOSTILE}"):
            synthetic.write(
                base / "runs", arm, seed, name=HOSTILE, header=header,
                facts=facts | {"techniques": [{HOSTILE: {HOSTILE: 1}}]},
                notes=(HOSTILE,), uses=[synthetic.teacher(name=HOSTILE)],
            )  # fmt: skip
    synthetic.write(base / "runs", f"-{HOSTILE}", name=HOSTILE, end="failed", header=header)
    out = base / "reports" / "with space)](javascript:alert(1))"
    assert (
        main(
            [
                "report",
                str(base / "runs"),
                "--out",
                str(out),
                "--title",
                HOSTILE,
                "--baseline",
                "plain",
            ]
        )
        == 0
    )
    bench = base / "reports" / "bench"
    bench.mkdir()
    (bench / "report.md").write_text(f"# {HOSTILE}\n\n`greenvis bench |x`\n")
    (bench / "results.json").write_text("{}")
    return base


def written(folder: Path) -> Path:
    """Return the folder of the report."""
    return next(p for p in (folder / "reports").iterdir() if p.name != "bench")


def test_html(folder: Path) -> None:
    text = (written(folder) / "index.html").read_text()
    safe_html(text)
    assert text.count("&lt;script&gt;") > 10


def test_markdown(folder: Path) -> None:
    safe_markdown((written(folder) / "report.md").read_text(), rows=15)
    safe_markdown((written(folder) / "exports" / "model-card.md").read_text(), rows=0)
    found = results(folder / "runs", baseline="plain")
    for arm in found.order:
        card = exports.model_card(found, arm)
        safe_markdown(card, rows=0)
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["library_name"] == "greenvis"


def test_svg(folder: Path) -> None:
    drawings = sorted((written(folder) / "figures").glob("*.svg"))
    assert len(drawings) >= 6
    for path in drawings:
        text = path.read_text()
        names = {
            element.tag.rpartition("}")[2].lower()
            for element in ElementTree.fromstring(text).iter()
        }
        assert names <= OURS, path
        assert [c for c in text if not c.isprintable() and c not in f"\n\t{JOINER}"] == []
        assert "javascript:" not in re.sub(r">[^<]*<", "><", text)


def test_csv(folder: Path) -> None:
    rows = list(csv.reader(io.StringIO((written(folder) / "results.csv").read_text())))
    assert {len(row) for row in rows} == {len(rows[0])}
    names = [row[0] for row in rows[1:]]
    assert sum(name.startswith(("'=", "'@", "'-", "' +")) for name in names) == 4
    assert not [c for name in names for c in name if not c.isprintable()]


def test_json(folder: Path) -> None:
    for path in (written(folder) / "results.json", *(written(folder) / "exports").glob("*.json")):
        assert SHOWN in json.dumps(json.loads(path.read_text()))


COMMANDS = {
    "ls": ["ls", "runs"],
    "ls grouped": ["ls", "runs", "--group", "name,arm"],
    "compare": ["compare", "runs", "runs"],
    "compare a report": ["compare", "REPORT", "runs"],
    "diff": ["diff", "runs", "runs"],
    "report": ["report", "runs", "--out", "again"],
    "report of results": ["report", "REPORT/results.json", "--out", "again", "--baseline", "plain"],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("form", ["text", "json"])
def test_terminal(name: str, form: str, folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    words = [word.replace("REPORT", str(written(folder))) for word in COMMANDS[name]]
    assert main([*words, *(["--json"] if form == "json" else [])]) == 0
    said = capsys.readouterr()
    safe_lines(said.out + said.err)
    if form == "json":
        assert SHOWN in json.dumps(json.loads(said.out))
    else:
        assert "alert" in said.out


def test_overview(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    assert main(["overview", "reports"]) == 0
    said = capsys.readouterr()
    safe_lines(said.out + said.err)
    safe_markdown(said.out, rows=2)
    links = re.findall(r'href="([^"]+)"', MarkdownIt("commonmark").enable("table").render(said.out))
    assert len(links) == 3 + 2  # a row per arm, and one per report
    assert all(link.startswith("reports/") and link.endswith("/report.md") for link in links)
    assert main(["overview", "reports", "--json"]) == 0
    text = capsys.readouterr().out
    safe_lines(text)
    assert json.loads(text)["techniques"][0]["technique"] == HOSTILE


def test_a_measured_cell() -> None:
    cell = json.loads((GPU / "cells" / "tokens.json").read_text())
    cell |= {"cell": HOSTILE, "about": HOSTILE}
    cell["device"] |= {"name": HOSTILE, "cuda": HOSTILE}
    cell["device"]["versions"] |= {"torch": HOSTILE, "timm": HOSTILE}
    for row in cell["rows"]:
        row |= {"setting": HOSTILE, "model": HOSTILE, "ms": HOSTILE, HOSTILE: HOSTILE}
    cells = [cell, {**cell, "reason": HOSTILE}]
    text = _page.markdown({"device": cell["device"], "cells": cells})
    safe_markdown(text, rows=2 * len(cell["rows"]))


ERRORS = {
    "a baseline": ["report", "runs", "--out", "again", "--baseline", f"{HOSTILE}?"],
    "a zone": ["report", "runs", "--out", "again", "--grid", HOSTILE],
    "records": ["report", HOSTILE.replace("\0", "")],
    "a column": ["ls", "runs", "--sort", HOSTILE],
    "a recipe": ["run", HOSTILE],
    "a setting": ["run", "recipe.yaml", "--set", HOSTILE],
    "a field": ["plan", "field.yaml"],
    "a technique": ["plan", "technique.yaml"],
    "a model": ["inspect", HOSTILE],
    "a data set": ["plan", "data.yaml"],
    "a class": ["plan", "class.yaml"],
    "an option": ["flops", "timm/vit_tiny_patch16_224", "--option", f"{HOSTILE}=1"],
    "a command": [HOSTILE],
    "an option's name": ["ls", f"--{HOSTILE}"],
    "a benchmark": ["bench", HOSTILE],
    "a form": ["export", "runs", "--to", HOSTILE],
    "an explanation": ["explain", HOSTILE],
    "a run": ["card", HOSTILE],
    "a budget": ["advise", "plain/mlp", "--data", "digits", "--budget", HOSTILE],
    "plans": ["advise", "plain/mlp", "--data", "digits", "--plans", HOSTILE],
    "a command to track": ["track", "--", HOSTILE],
}
RECIPE: dict[str, Any] = {
    "name": "pets", "data": {"name": "digits", "train": 32, "test": 16},
    "model": {"ref": "plain/mlp", "img_size": 8},
    "train": {"seeds": [0]}, "arms": {"full": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_texts(name: str, folder: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    for file, change in {
        "recipe": {}, "field": {HOSTILE.replace("\0", ""): 1}, "data": {"data": {"name": HOSTILE}},
        "technique": {"arms": {"full": {"techniques": [{HOSTILE: {}}]}}},
        "class": {"data": {**RECIPE["data"], "classes": [HOSTILE, "1"]}},
    }.items():  # fmt: skip
        Path(f"{file}.yaml").write_text(yaml.safe_dump({**RECIPE, **change}))
    assert main(ERRORS[name]) == 2
    said = capfd.readouterr()
    safe_lines(said.out + said.err)
    assert said.err.startswith("greenvis: ")


def test_a_run_on_hostile_folders(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """What a user does with a data set of others: class names, a title and a path are hostile in
    every step."""
    monkeypatch.chdir(tmp_path)
    name = HOSTILE.replace("/", "_").replace("\0", "")
    data = tmp_path / name
    for label in (f"a{name}", f"b{name}"):
        (data / label).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(data / label / f"{i}.png")
    title = "".join(c for c in HOSTILE if c.isprintable())
    recipe = {
        **RECIPE, "data": {"name": f"folder:{name}", "img_size": 8, "in_chans": 1},
        "report": {"title": title, "note": title},
        "meter": {"codecarbon": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for words in (
        ["plan", "recipe.yaml"], ["run", "recipe.yaml"], ["ls"], ["report", "runs", "--out",
        "again"], ["overview"],
        ["card", "runs/pets/full/seed0"], ["export", "runs/pets/full/seed0", "--to", "safetensors",
        "--out", "exported"],
    ):  # fmt: skip
        assert main(words) == 0, words
        said = capfd.readouterr()
        safe_lines(said.out + said.err)
    safe_html((tmp_path / "reports" / "pets" / "index.html").read_text())
    safe_markdown((tmp_path / "reports" / "pets" / "report.md").read_text(), rows=2)
    safe_markdown((tmp_path / "exported" / "README.md").read_text(), rows=0)


def test_the_recipe_that_advice_writes_is_that_recipe(tmp_path: Path) -> None:
    comment = [f"of {HOSTILE}", "", f"  greenvis run {shlex.quote(HOSTILE)}"]
    candidates.written(tmp_path / "recipe.yaml", RECIPE, comment=comment)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == RECIPE


@pytest.mark.parametrize(
    "text", ["a", "a b", "a`b", "a|b", "a\\", "<b>", "[a](b)", "", " ", "`", "\x1b", HOSTILE]
)
def test_names_in_markdown_are_text(text: str) -> None:
    for shown in (code(text), md(text), link(text, text)):
        html = (
            MarkdownIt("commonmark")
            .enable("table")
            .render(f"| h | h |\n|--|--|\n| x {shown} y | z |\n")
        )
        safe_html(html.replace(f'href="{link("", text)[3:-1]}"', ""))
        assert html.count("<td>") == 2


def test_a_terminal_gets_no_control_character() -> None:
    for shown in (
        errors.one_line(HOSTILE),
        output.message(HOSTILE),
        output.json_text({HOSTILE: HOSTILE, "\udcff": "\x85"}),
    ):
        safe_lines(shown)
    assert json.loads(output.json_text({HOSTILE: [HOSTILE]}, indent=2)) == {HOSTILE: [HOSTILE]}
