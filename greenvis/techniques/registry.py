"""Find technique classes by name, and describe them without importing any."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from greenvis.core.technique import Technique
from greenvis.plugins import Door

CATALOGUE = Path(__file__).with_name("catalogue.json")
DOOR = Door(
    "technique", Technique, "greenvis.techniques", "greenvis.techniques", besides=["registry"]
)
names, find = DOOR.names, DOOR.find


def find_class(class_name: str) -> type[Technique] | None:
    """Return the technique class named `class_name` ("Lora"), or None. Serves `greenvis.Lora`."""
    for name in names():
        if name.replace("_", "").casefold() == class_name.casefold():
            cls = find(name)
            return cls if cls.__name__ == class_name else None
    return None


def about(name: str) -> dict[str, Any]:
    """Describe a technique. Those of greenvis come from a file made from their classes (`make
    readme`, held against them by a test), for importing one takes seconds: it imports torch.

    Args:
        name: as in a recipe.

    Returns:
        {"stage", "doc", "schema": the JSON Schema of its settings}.

    Raises:
        BadInput: for a name that is none.
    """
    if name in DOOR.own and name in (entries := _catalogue()):
        return entries[name]
    return describe(find(name))


def describe(cls: type[Technique]) -> dict[str, Any]:
    """Return what `about` says of a class."""
    return {"stage": cls.stage, "doc": inspect.getdoc(cls), "schema": cls.model_json_schema()}


def catalogue() -> str:
    """Return the text of catalogue.json: `describe` of every technique of greenvis's own."""
    entries = {name: describe(find(name)) for name in sorted(DOOR.own)}
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


@cache
def _catalogue() -> dict[str, Any]:
    return json.loads(CATALOGUE.read_text())
