"""The sections of a report, each a class in the file of its name; those of other packages come
through the entry points `greenvis.report_sections`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from greenvis.plugins import Door
from greenvis.report.section import Section

DOOR: Door[Section[Any]] = Door(
    "report section", Section, "greenvis.report.sections", "greenvis.report_sections"
)
# "" stands for those of other packages, by name
ORDER = (
    "verdict",
    "arms",
    "frontier",
    "figures",
    "settings",
    "drawn",
    "segments",
    "labels",
    "paper",
    "",
    "details",
    "cycle",
    "trust",
    "repeat",
)


def ordered() -> Iterator[Section[Any]]:
    """Yield the sections as a page shows them.

    Raises:
        GreenvisError: for a plug-in that does not load.
    """
    others = sorted({*DOOR.plugged} - {*DOOR.own})
    for entry in ORDER:
        for name in [entry] if entry else others:
            yield DOOR.find(name)()
