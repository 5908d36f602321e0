"""What arms computed of their frozen parts once and read back after, as the runs' facts say."""

from __future__ import annotations

from collections.abc import Iterable

from greenvis.report.arm_results import Outputs
from greenvis.report.estimates import Free
from greenvis.report.facts import COUNTS


def means(runs: Iterable[list[Free]]) -> list[Outputs]:
    """Return an entry for each part whose outputs were kept, means over runs."""
    by_part: dict[str, list[Free]] = {}
    for entry in (entry for entries in runs for entry in entries):
        by_part.setdefault(str(entry.get("part")), []).append(entry)
    return [
        Outputs(part=part, **{k: sum(e[k] for e in each) / len(each) for k in COUNTS})
        for part, each in by_part.items()
    ]
