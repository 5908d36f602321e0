"""What arms kept of their frozen parts: outputs computed once and read back after, as the runs'
facts say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from greenvis.report.formatting import si

COUNTS = ("misses", "hits", "earlier", "bytes")


def rows(facts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each part that was kept, {"part", "misses", "hits", "earlier", "bytes"}:
    means over runs."""
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for one in facts:
        for value in one.values():
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, Mapping) and all(
                    isinstance(entry.get(key), int) for key in COUNTS
                ):
                    by_part.setdefault(str(entry.get("part")), []).append(entry)
    return [
        {"part": part, **{k: sum(e[k] for e in each) / len(each) for k in COUNTS}}
        for part, each in by_part.items()
    ]


def merged(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first process's facts, with what was computed and read back by all processes of
    the run."""
    out, added = dict(facts[0]), {*COUNTS, "checked"} - {"bytes"}
    for key, value in out.items():
        every = [one[key] for one in facts if key in one]
        if isinstance(value, list) and all(
            isinstance(entry, Mapping) and "misses" in entry for entry in value
        ):
            out[key] = [
                {
                    **entry,
                    **{
                        k: sum(entries[i].get(k, 0) for entries in every if i < len(entries))
                        for k in entry
                        if k in added
                    },
                }
                for i, entry in enumerate(value)
            ]
    return out


def section(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the report; empty where no arm kept anything."""
    cells = [
        [
            a,
            row["part"],
            si(row["misses"]),
            si(row["hits"]),
            si(row["earlier"]),
            si(row["bytes"], "B"),
        ]
        for a in results["order"]
        for row in results["arms"][a].get("kept", ())
    ]
    head = ["Arm", "Outputs of", "Computed", "Read back", "… computed by an earlier run", "On disk"]
    text = (
        "Images whose outputs of a frozen part were computed, and read back from disk instead; "
        "means over seeds, of the start "
        "that finished. What an earlier run computed is paid for in that run's record, not in this "
        "arm's energy."
    )
    table = {"head": head, "rows": cells} if cells else None
    return {"title": "Kept outputs", "items": [text] if cells else [], "table": table}
