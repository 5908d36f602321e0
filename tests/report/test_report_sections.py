"""Report sections: one definition for HTML and Markdown, and a contract that catches what breaks
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from greenvis.errors import GreenvisError
from greenvis.report import page, sections
from greenvis.report.blocks import Block, paragraph
from greenvis.report.section import Section
from greenvis.report.shape import Results
from greenvis.testing import check_section
from greenvis.testing.sections import FENCED, HOSTILE, STATES, example


def test_the_order_names_every_section_once() -> None:
    names = [section.name for section in sections.ordered()]
    assert names == [name for name in sections.ORDER if name]
    assert set(names) == {*sections.DOOR.own}


@pytest.mark.parametrize("name", sorted(sections.DOOR.own))
def test_a_section_keeps_the_contract(name: str) -> None:
    check_section(sections.DOOR.find(name))


def test_what_has_nothing_to_say_is_left_out() -> None:
    bare = example("no finished run")
    settings = sections.DOOR.find("settings")
    assert page.shown(bare, settings()) is None
    shown = page.shown(bare, sections.DOOR.find("figures")())
    assert shown is not None
    assert "There is nothing to draw" in page.markdown("t", [shown])


def test_both_forms_come_from_one_list_and_stay_text() -> None:
    every = [s for x in sections.ordered() if (s := page.shown(example(STATES[0]), x))]
    html, markdown = page.html(HOSTILE, every), page.markdown(HOSTILE, every)
    for s in every:
        assert f'<section id="{s.name}"' in html
        assert f"\n## {s.title}\n" in markdown
    assert html.count("<script") == 1  # the page's own
    assert "<script" not in FENCED.sub("", markdown)


class _Wrong(Section[Results]):
    name, title = "wrong", "Wrong"

    def compute(self, results: Results) -> Results | None:
        return results

    def render(self, value: Results) -> Sequence[Block]:
        return [paragraph(f"{value.arms['plain'].inference_energy_j.value}")]


class _Empty(_Wrong):
    def render(self, value: Results) -> Sequence[Block]:
        return []


class _Raising(_Wrong):
    def render(self, value: Results) -> Sequence[Block]:
        joules: Any = value.arms["plain"].train_energy_j.value
        return [paragraph(f"{joules:.3g}")]


class _Unnamed(_Wrong):
    name = "no anchor"


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (_Wrong, "no inference: a missing figure is written as None"),
        (_Empty, "it shows nothing: return None from compute"),
        (_Raising, "no finished run: it raises TypeError"),
        (_Unnamed, "'no anchor' is no anchor"),
    ],
)
def test_what_breaks_the_contract_is_named(cls: type[Section[Any]], why: str) -> None:
    with pytest.raises(GreenvisError, match="report section") as error:
        check_section(cls)
    assert why in str(error.value)


def test_different_numbers_in_the_two_forms_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    markdown = page.markdown
    monkeypatch.setattr(page, "markdown", lambda *a: markdown(*a).replace("1,000 images", "images"))
    with pytest.raises(GreenvisError, match=r"different numbers: 1,000"):
        check_section(sections.DOOR.find("cycle"))
