"""How far to trust a report: generated from the results, so that it cannot be left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from greenvis.report.blocks import Block, Bullets, Grid, Heading
from greenvis.report.section import Section
from greenvis.report.sections._checks import checks
from greenvis.report.sections._counted import counted
from greenvis.report.sections._grids import Said, outputs, predicted, teachers
from greenvis.report.sections._runs import runs
from greenvis.report.sections._sources import intensity, sources
from greenvis.report.shape import Results

MOST_NOTES = 50
Part = tuple[str, list[str], Grid | None]  # title, sentences, table


class Trust(Section[list[Part]]):
    """What is counted, how, and what is missing."""

    name = "trust"
    title = "How far to trust this"
    folded = True

    def compute(self, results: Results) -> list[Part]:
        """Return the parts, those that have nothing to say left out."""
        parts: list[Part] = [
            ("What is counted", counted(results), None),
            ("Sources of energy", [], sources(results)),
            ("Carbon intensity", intensity(results), None),
            ("Not counted", results.not_counted, None),
            ("Runs", runs(results), None),
            ("Cross-check and disturbance", checks(results), None),
            _part(predicted(results)),
            _part(outputs(results)),
            _part(teachers(results)),
            ("Notes of the runs", results.notes[:MOST_NOTES], None),
            ("Environment and data", _environment(results), None),
        ]
        return [part for part in parts if part[1] or part[2]]

    def render(self, value: list[Part]) -> Sequence[Block]:
        """Return each part below its heading."""
        blocks: list[Block] = []
        for title, items, grid in value:
            blocks.append(Heading(title))
            blocks += [Bullets(tuple(items))] if items else []
            blocks += [grid] if grid else []
        return blocks


def _part(table: Said | None) -> Part:
    if table is None:
        return "", [], None
    text, grid = table
    return grid.label, [text], grid


def _environment(results: Results) -> list[str]:
    env = results.environment
    parts: list[tuple[str, list[Any]]] = [
        ("Processor", env.cpu[:5]),
        ("GPU", env.gpu[:5]),
        ("System", env.os[:5]),
        ("Host", env.host[:5]),
        ("Versions", env.versions[:5]),
        ("Data", results.data[:10]),
        ("Model", results.models[:10]),
        ("Code", results.git[:5]),
    ]
    return [f"{title}: {_flat(value)}" for title, values in parts for value in values]


def _flat(value: Any) -> str:
    """Return a record's value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items() if v not in (None, "", [], {}))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
