"""What a column of a table is: figures and texts of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: `number` for the CSV, `text` for people, `sub` a second line, `shown`: a
    difference is."""

    key: str
    title: str
    number: Callable[[Row], float | None]
    text: Callable[[Row], str]
    sub: Callable[[Row], str] = lambda row: ""
    badge: Callable[[Row], str | None] = lambda row: None
    shown: Callable[[Row], bool] = lambda row: False
