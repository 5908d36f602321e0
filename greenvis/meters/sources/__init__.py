"""Where joules come from: one class per kind of counter, found by name."""

from __future__ import annotations

from greenvis.errors import GreenvisError
from greenvis.meters.sources.base import Integral, MeterSource, Unavailable, in_words
from greenvis.plugins import Door

__all__ = ["DOOR", "Integral", "MeterSource", "Unavailable", "installed"]

DOOR = Door(
    "meter source",
    MeterSource,
    "greenvis.meters.sources",
    "greenvis.meter_sources",
    besides=["base"],
)


def installed() -> tuple[list[MeterSource], list[str]]:
    """Return a source of each kind there is, own and plugged in, none opened yet, and in words what
    is amiss with plug-ins that do not load."""
    sources: list[MeterSource] = []
    problems: list[str] = []
    for name in DOOR.names():
        try:
            sources.append(DOOR.find(name)())
        except GreenvisError as error:
            problems.append(str(error))
        except Exception as error:  # of a plug-in's own: no run ends for it
            problems.append(f"the meter source '{name}' cannot be made: {in_words(error)}")
    return sources, problems
