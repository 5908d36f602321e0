"""What a column of a table is: figures and texts of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from greenvis.report.arm_results import ArmResults


@dataclass(frozen=True)
class Column:
    """One column: `number` for the CSV, `text` for people, `sub` a second line, `shown`: a
    difference is."""

    key: str
    title: str
    number: Callable[[ArmResults], float | None]
    text: Callable[[ArmResults], str]
    sub: Callable[[ArmResults], str] = lambda row: ""
    badge: Callable[[ArmResults], str | None] = lambda row: None
    shown: Callable[[ArmResults], bool] = lambda row: False
