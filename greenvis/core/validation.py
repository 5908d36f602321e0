"""What a validated model (a request, a recipe, a card) refuses, in words: where, which key, what is
wrong, the nearest right name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from greenvis.errors import nearest, printable

MOST_PROBLEMS = 20  # of one message
# by field: another field, and the values of it that count
OnlyWith = Mapping[str, tuple[str, tuple[Any, ...]]]
M = TypeVar("M", bound=BaseModel)


def refuse_idle(spec: M, only_with: OnlyWith) -> M:
    """Refuse a field that differs from its default and changes nothing beside another's value.

    Args:
        spec: The model to check.
        only_with: By field: another field, and its values with which the field counts.

    Returns:
        `spec`.

    Raises:
        ValueError: Where a field is set in vain.
    """
    for name, (other, values) in only_with.items():
        chosen = getattr(spec, other)
        if chosen not in values and getattr(spec, name) != type(spec).model_fields[name].default:
            raise ValueError(
                f"'{name}' changes nothing with {other}: {chosen}; it is of {other}: "
                f"{' or '.join(map(str, values))}"
            )
    return spec


def explain(
    error: ValidationError,
    kind: type[BaseModel],
    where: Callable[..., str],
    at: tuple[str | int, ...] = (),
) -> str:
    """Say each problem of a validation on a line: where, which key, what is wrong, the nearest
    right name.

    Args:
        error: What pydantic raised.
        kind: The model class that was validated.
        where: From a key path to what stands before it in the line ("recipe.yaml:3").
        at: The key path of the value that was validated.

    Returns:
        The message.
    """
    out = []
    for problem in error.errors():
        loc = tuple(
            p
            for p in problem["loc"]
            if not (isinstance(p, str) and p in ("str", "dict[str,nullable[dict[str,any]]]"))
        )
        key = (*at, *loc)
        path = ".".join(str(k) for k in key)
        if problem["type"] == "extra_forbidden":
            message = f"unknown field '{loc[-1]}'{nearest(str(loc[-1]), _fields(kind, loc[:-1]))}"
        elif problem["type"] == "missing":
            message = f"'{loc[-1]}' is missing"
        elif (
            problem["type"] == "value_error"
        ):  # of a check of ours, which has the value in its words
            message = str(problem.get("ctx", {}).get("error", problem["msg"]))
        else:
            text, value = problem["msg"], format_value(problem["input"])
            message = f"{text[:1].lower()}{text[1:]}, not {value}"
            if problem["type"] == "literal_error":
                message += nearest(str(problem["input"]), _choices(kind, loc))
        line = f"{where(*key)}: {path + ': ' if path else ''}{message}"
        if line not in out:
            out.append(line)
        if len(out) == MOST_PROBLEMS:
            return "\n".join([*out, f"… and {error.error_count() - MOST_PROBLEMS} more"])
    return "\n".join(out)


def _field(kind: Any, loc: tuple[Any, ...]) -> Any:
    """Return the annotation at `loc` below a model class, or None."""
    for step in loc:
        fields = getattr(kind, "model_fields", None)
        if fields and step in fields:
            kind = fields[step].annotation
        else:  # into a dict or list: the value's type
            inner = [a for a in get_args(kind) if hasattr(a, "model_fields")]
            kind = inner[0] if inner else None
    return kind


def _fields(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    return list(getattr(_field(kind, loc), "model_fields", {}))


def _choices(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    annotation = _field(kind, loc)
    return [
        str(v)
        for a in (annotation, *get_args(annotation))
        for v in (get_args(a) if get_args(a) else (a,))
        if isinstance(v, (str, int))
    ]


def format_value(value: Any) -> str:
    """Format a value for a message, cut short and printable."""
    # Python refuses to write thousands of digits
    if isinstance(value, int) and abs(value) > 10**18:
        return f"a whole number of {value.bit_length()} bits"
    text = printable(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) < 60 else text[:57] + "…"
