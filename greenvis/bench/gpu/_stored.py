"""A cell's result read back from a folder, in which anybody may have written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenvis.core import files
from greenvis.core.technique import explain
from greenvis.errors import BadInput
from greenvis.report.schema import is_plain

_Word = Annotated[str, Field(max_length=2000)]
_Float = Annotated[float, Field(ge=-1e30, le=1e30)]
_Count = Annotated[float, Field(ge=0, le=1e30)]


class _Cpu(BaseModel):
    model_config = ConfigDict(extra="allow")
    allowed: Annotated[int, Field(ge=1, le=10**6)]


class _Device(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: _Word
    rehearsal: bool
    cpu: _Cpu
    cuda: _Word | None
    versions: dict[_Word, _Word | None]


class _Row(BaseModel):
    """Figures by name, finite; an energy ratio comes with its range."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, _Word | _Float | None]  # pyright: ignore
    setting: _Word
    energy_ratio: Annotated[float, Field(ge=1e-9, le=1e9)] | None = None
    low: _Count | None = None
    high: _Count | None = None
    observed: Annotated[list[dict[_Word, _Float]], Field(max_length=1000)] = []


class _Cell(BaseModel):
    model_config = ConfigDict(extra="allow")
    cell: _Word
    about: _Word
    reason: _Word
    seconds: Annotated[float, Field(ge=0, le=1e9)]
    device: _Device
    rows: Annotated[list[_Row], Field(max_length=1000)]


def read_cell(path: Path, name: str) -> dict[str, Any]:
    """Return the result of the cell of that name. Raises BadInput with file and field for anything
    else."""
    content = files.read_json(path, "measured cell")
    if not is_plain(content):
        raise BadInput(f"{path}: numbers that are not finite, or nested too deeply; remove it")
    try:
        cell = _Cell.model_validate(content)
    except ValidationError as error:
        raise BadInput(
            f"{explain(error, _Cell, lambda *key: str(path))}; remove it to measure the cell again"
        ) from error
    ranged = all(row.energy_ratio is None or None not in (row.low, row.high) for row in cell.rows)
    if cell.cell != name or not ranged:
        problem = "a row has no range" if cell.cell == name else f"it is of another, '{cell.cell}'"
        raise BadInput(f"{path}: {problem}; remove it to measure the cell '{name}' again")
    return content
