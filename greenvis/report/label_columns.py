"""Labels, hours and images of an arm as columns of results.csv."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.report import label_curve
from greenvis.report.arm_results import ArmResults
from greenvis.report.columns import Column
from greenvis.report.shape import Results


def columns(results: Results) -> list[Column]:
    """Return labels by kind and purpose, the hours they take a person, and images by role; none
    where no record counts labels."""
    rows = [row for row in results.rows.values() if row.labels]
    spent = dict.fromkeys((part.kind, part.why) for row in rows for part in row.labels)
    roles = dict.fromkeys(role for row in rows for role in row.images)
    return [
        *(_column(f"labels_{kind}_{why}", _count(kind, why)) for kind, why in spent),
        *(
            _column(f"label_hours{end}", _hours(results, bound))
            for end, bound in (("", "central"), ("_low", "low"), ("_high", "high"))
            if rows
        ),
        *(_column(f"images_{role}", _images(role)) for role in roles),
    ]


def _column(key: str, number: Callable[[ArmResults], float | None]) -> Column:
    return Column(key, key, number, lambda row: "")


def _count(kind: str, why: str) -> Callable[[ArmResults], float | None]:
    def count(row: ArmResults) -> float | None:
        parts = [part.count for part in row.labels if (part.kind, part.why) == (kind, why)]
        return parts[0] if parts else None

    return count


def _hours(results: Results, bound: str) -> Callable[[ArmResults], float | None]:
    return lambda row: (label_curve.hours(row, results) or {}).get(bound)


def _images(role: str) -> Callable[[ArmResults], float | None]:
    return lambda row: row.images.get(role)
