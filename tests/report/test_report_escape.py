"""Names, notes and paths from records never become markup or formulas."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from greenvis.report import page, report, results
from greenvis.report.markup import fence, md
from greenvis.report.page import to_csv

NASTY = synthetic.NASTY


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every text a record can hold is hostile."""
    runs = tmp_path_factory.mktemp("runs")
    source = {**synthetic.CPU, "source": NASTY, "citation": NASTY, "reason": NASTY}
    header = {
        "components": [source], "host": NASTY, "command": ["python", NASTY], "git": NASTY,
        "versions": {NASTY: NASTY},
        "carbon_intensity": {**synthetic.WORLD, "zone": NASTY, "source": NASTY},
    }  # fmt: skip
    facts = {
        "recipe": f"```\n</pre>{NASTY}", "techniques": [NASTY], "data": {"name": NASTY},
        "task_accuracy": [[0.9, 0.1], [0.5, 0.8]], "codecarbon": {"energy_j": 1.0, "mode": NASTY},
    }  # fmt: skip
    for seed in range(2):
        synthetic.write(runs, "baseline", seed, name=NASTY, header=header, facts=facts)
        synthetic.write(
            runs,
            NASTY,
            seed,
            name=NASTY,
            header=header,
            facts=facts,
            notes=(NASTY,),
            uses=[synthetic.teacher(name=NASTY)],
        )
    synthetic.write(runs, "=HYPERLINK(1)\x00\x1b[31m", name=NASTY, end="failed", header=header)
    return report(
        runs, out=tmp_path_factory.mktemp("out"), title=NASTY, note=f"noted {NASTY}"
    ).parent


def test_html_holds_our_tags_only(nasty: Path) -> None:
    text = (nasty / "index.html").read_text()
    assert "noted" in text[: text.index('id="arms"')]
    assert "noted" in (nasty / "report.md").read_text().partition("## Arms")[0]
    tags = _Tags()
    tags.feed(text)
    names = {t for t, _ in tags.seen}
    assert not names & {"img", "iframe", "object", "form", "b1"}
    assert [attrs for tag, attrs in tags.seen if tag == "script"] == [{}]
    own = (page.TEMPLATES / "page.js").read_text()
    assert f"<script>\n{own}</script>" in text
    assert f"script-src 'sha256-{_hash(own)}'" in text  # no other script runs
    assert all(not k.startswith("on") for _, attrs in tags.seen for k in attrs)
    assert all(not (attrs.get("href") or "").startswith("javascript") for _, attrs in tags.seen)
    assert "&lt;script&gt;alert" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text)  # nothing from the network
    ids = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_figures_are_xml_that_says_what_it_shows(nasty: Path) -> None:
    figures = sorted((nasty / "figures").glob("*.svg"))
    assert len(figures) >= 6
    for file in figures:
        root = ElementTree.parse(file).getroot()
        assert root.get("role") == "img"
        assert root[0].tag.endswith("title")
        assert root[1].tag.endswith("desc")
        assert root[1].text
        assert not [e for e in root.iter() if e.tag.endswith("script")]
        assert "<dc:date>" not in file.read_text()


def test_markdown_shows_text_as_it_is(nasty: Path) -> None:
    text = (nasty / "report.md").read_text()
    html = MarkdownIt("commonmark").enable("table").render(text)
    tags = _Tags()
    tags.feed(html)
    assert {t for t, _ in tags.seen} <= {
        "h1", "h2", "h3", "p", "strong", "em", "table", "thead", "tbody", "tr", "th", "td", "ul",
        "li", "a", "img", "br",
        "pre", "code",
    }  # fmt: skip
    assert all(not (attrs.get("href") or "").startswith("javascript") for _, attrs in tags.seen)
    rows = [
        len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n") if line.startswith("|")
    ]
    assert len(rows) > 10
    assert "$x" not in re.sub(r"(`{3,})text\n.*?\n\1\n", "", text, flags=re.S).replace("\\$", "")


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_any_text_in_markdown_is_that_text(text: str) -> None:
    html = (
        MarkdownIt("commonmark")
        .enable("table")
        .enable("strikethrough")
        .render(f"| a |\n|--|\n| x {md(text)} y |\n")
    )
    tags = _Tags()
    tags.feed(html)
    assert [t for t, _ in tags.seen] == ["table", "thead", "tr", "th", "tbody", "tr", "td"]


@given(st.text(alphabet="`~a\n ", max_size=60))
def test_a_fence_is_not_ended_by_its_text(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(fence(text) + "\n\nafter\n")
    assert [t.type for t in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


def test_csv_cells_are_no_formulas(nasty: Path, tmp_path: Path) -> None:
    rows = list(csv.reader(io.StringIO((nasty / "results.csv").read_text())))
    assert {len(r) for r in rows} == {len(rows[0])}
    assert any(r[0].startswith("'=HYPERLINK") for r in rows)
    for name in ("+1", "-1", "@SUM(1)", "\t=1", " =1", "＝1"):
        synthetic.write(tmp_path, name)
    for row in list(csv.reader(io.StringIO(to_csv(results(tmp_path)))))[1:]:
        assert row[0].startswith("'")
        float(row[rows[0].index("accuracy")])  # numbers stay numbers
