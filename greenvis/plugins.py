"""A door: classes of one kind found by name, in a package of greenvis's own or through an entry
point of an outside package. Techniques, tasks, data sets, meter sources and report sections have
one each."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from greenvis.errors import BadInput, GreenvisError, nearest

T = TypeVar("T")


class Door(Generic[T]):
    """Find classes of one kind by name; none is imported before it is asked for.

    A class of greenvis's own stands in the file of its name, in `package` or in a package below it
    that does not begin with `_`, and has that name as its attribute `name`.

    Args:
        kind: what such a class is called in messages, such as "technique".
        base: the class they derive from.
        package: the module path of the package that holds greenvis's own.
        group: the group of entry points of the others, such as "greenvis.techniques".
        besides: modules of the package itself that hold no such class, such as "registry".
        separator: what stands in a name where its file's name has "_".

    Example:
        >>> from greenvis.core.technique import Technique
        >>> package = "greenvis.techniques"
        >>> door = Door("technique", Technique, package, package, besides=["registry"])
        >>> door.find("lora").name
        'lora'
    """

    def __init__(
        self,
        kind: str,
        base: type[T],
        package: str,
        group: str,
        besides: Collection[str] = (),
        separator: str = "_",
    ) -> None:
        self.kind, self.base, self.package, self.group = kind, base, package, group
        self.separator = separator
        self.besides = {f"{package}.{module}" for module in besides}

    def names(self) -> list[str]:
        """Return the names of all classes there are, own and plugged in. Imports none of them."""
        return sorted({*self.own, *self.plugged})

    def find(self, name: str) -> type[T]:
        """Return a class, importing only its file.

        Args:
            name: as in a recipe.

        Raises:
            BadInput: for an unknown name, with the nearest one.
            GreenvisError: for a plug-in that does not load, or is no class of this kind.
        """
        if name in self.own:
            return self._class_in(importlib.import_module(self.own[name]), name)
        if name not in self.plugged:
            raise BadInput(f"unknown {self.kind} '{name}'{nearest(name, self.names())}")
        point = self.plugged[name]
        try:
            cls = point.load()
        except Exception as error:
            raise GreenvisError(
                f"the plug-in {self.kind} '{name}' ({point.value}) does not load: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise GreenvisError(
                f"the entry point '{name}' ({point.value}) is not a greenvis "
                f"{self.base.__name__} class"
            )
        return cls

    @cached_property
    def own(self) -> dict[str, str]:
        """Module paths of greenvis's own classes, by name."""
        root = Path(str(importlib.import_module(self.package).__file__)).parent
        files = [path.relative_to(root).with_suffix("").parts for path in root.rglob("*.py")]
        public = [parts for parts in files if not any(part.startswith("_") for part in parts)]
        modules = {parts[-1]: ".".join([self.package, *parts]) for parts in public}
        return {
            name.replace("_", self.separator): module
            for name, module in modules.items()
            if module not in self.besides
        }

    @cached_property
    def plugged(self) -> dict[str, EntryPoint]:
        """Entry points of outside packages, by name."""
        return {point.name: point for point in entry_points(group=self.group)}

    def _class_in(self, module: Any, name: str) -> type[T]:
        for value in vars(module).values():
            own = isinstance(value, type) and vars(value).get("name") == name
            if own and issubclass(value, self.base):
                return value
        raise GreenvisError(f"{module.__name__} holds no {self.kind} named '{name}'")
