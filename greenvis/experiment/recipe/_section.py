"""What all sections of a recipe share: strict fields, and errors that name file:line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greenvis.core.validation import explain, format_value
from greenvis.core.yamlfile import Key
from greenvis.errors import BadInput

Where = Callable[..., str]  # key path -> "file:line"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Section(BaseModel):
    """A part of a recipe: no other fields than its own, and no change once it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=20_000
    )


def named(find: Callable[[str], type[Any]], item: Any, where: Where, at: Key) -> Any:
    """Return what an entry asks for, "NAME" or {NAME: {fields}}."""
    entry = {item: {}} if isinstance(item, str) else item
    if not isinstance(entry, dict) or len(entry) != 1:
        raise BadInput(
            f"{where(*at)}: one name an item, with its fields below it, as in "
            f"'lora: {{rank: 8}}', not {format_value(item)}"
        )
    ((name, fields),) = entry.items()
    try:
        kind = find(name)
    except BadInput as error:
        raise BadInput(f"{where(*at, name)}: {error}") from error
    return validated(kind, fields or {}, where, (*at, name))


def validated(kind: type[Any], fields: Mapping[str, Any], where: Where, at: Key) -> Any:
    """Return what fields ask for. Raises BadInput that names file:line for those that are wrong."""
    try:
        return kind(**fields)
    except (ValidationError, BadInput) as error:
        problem = error if isinstance(error, ValidationError) else error.__cause__
        if not isinstance(problem, ValidationError):
            raise
        raise BadInput(explain(problem, kind, where, at)) from error
