"""Find technique classes by name: greenvis's own folder first, then the entry points
`greenvis.techniques`."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import greenvis.techniques
from greenvis.core.technique import Technique
from greenvis.errors import BadInput, GreenvisError, nearest

GROUP = "greenvis.techniques"
CATALOGUE = Path(__file__).with_name("catalogue.json")


def names() -> list[str]:
    """Return the names of all techniques there are, own and plugged in. Imports none of them."""
    return sorted({*_own(), *_plugged()})


def find(name: str) -> type[Technique]:
    """Return a technique's class, importing only its file.

    Args:
        name: as in a recipe.

    Raises:
        BadInput: for an unknown name, with the nearest one.
        GreenvisError: for a plug-in that does not load.
    """
    if name in _own():
        return _class_in(importlib.import_module(_own()[name]), name)
    if name in _plugged():
        point = _plugged()[name]
        try:
            cls = point.load()
        except Exception as error:
            raise GreenvisError(
                f"the plug-in technique '{name}' ({point.value}) does not load: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Technique)):
            raise GreenvisError(
                f"the entry point '{name}' ({point.value}) is not a greenvis.Technique class"
            )
        return cls
    raise BadInput(f"unknown technique '{name}'{nearest(name, names())}")


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
    if name in _own() and name in (entries := _catalogue()):
        return entries[name]
    return describe(find(name))


def describe(cls: type[Technique]) -> dict[str, Any]:
    """Return what `about` says of a class."""
    return {"stage": cls.stage, "doc": inspect.getdoc(cls), "schema": cls.model_json_schema()}


def catalogue() -> str:
    """Return the text of catalogue.json: `describe` of every technique of greenvis's own."""
    entries = {name: describe(find(name)) for name in sorted(_own())}
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


@cache
def _catalogue() -> dict[str, Any]:
    return json.loads(CATALOGUE.read_text())


@cache
def _own() -> dict[str, str]:
    """Return module paths by technique name: a technique is the file of its name in a package of
    its family below techniques/."""
    root = greenvis.techniques.__name__ + "."
    walked = pkgutil.walk_packages(greenvis.techniques.__path__, root)
    files = [m.name for m in walked if not m.ispkg and "._" not in m.name]
    return {f.rpartition(".")[2]: f for f in files if "." in f.removeprefix(root)}


@cache
def _plugged() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _class_in(module: object, name: str) -> type[Technique]:
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Technique)
            and vars(value).get("name") == name
        ):
            return value
    raise GreenvisError(f"{module} holds no Technique named '{name}'")
