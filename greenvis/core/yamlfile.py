"""A YAML file with inheritance, overrides from the command line, and the line every key stands
on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from greenvis.core import files
from greenvis.errors import BadInput, nearest

Key = tuple[str | int, ...]
MOST_BYTES = 256 * 1024  # of a recipe
MOST_DEPTH = 40
MOST_NODES = 20_000
MOST_KEY = 200  # characters
MOST_PARENTS = 20  # recipes that extend one another
# keys of older recipes, after the section they stand in, and their name today
RENAMED: dict[Key, str] = {("train", "target_accuracy"): "target"}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster


def read(path: Path, below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return a file's values, laid over those of its `extends:` parent, and "file:line" by key
    path.

    below: the files that led here, to notice a circle. Raises BadInput with file:line.
    """
    node = compose(files.read_text(path, "recipe", MOST_BYTES), str(path))
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{path}:1: a recipe is a mapping with 'name', 'data', 'model' and 'arms'")
    lines: dict[Key, str] = {(): f"{path}:1"}
    source = _Values(str(path), lines).of(node, ())
    parent = source.pop("extends", None)
    if parent is None:
        return source, lines
    if not isinstance(parent, str) or (path.parent / parent).resolve() in {
        p.resolve() for p in (*below, path)
    }:
        raise BadInput(
            f"{lines[('extends',)]}: 'extends' takes the path of another recipe, which must not "
            "lead back to this one"
        )
    if not (path.parent / parent).is_file():
        raise BadInput(f"{lines[('extends',)]}: no recipe at {path.parent / parent}")
    if len(below) >= MOST_PARENTS:
        raise BadInput(
            f"{lines[('extends',)]}: more than {MOST_PARENTS} recipes extend one another"
        )
    base, base_lines = read(path.parent / parent, (*below, path))
    return _merged(base, source), base_lines | lines


def compose(text: str, source: str) -> yaml.Node | None:
    """Return the node tree of a YAML text; None for an empty one.

    Raises BadInput with `source`:line for what is not YAML, nested deeper than MOST_DEPTH, or of
    more than MOST_NODES parts.
    """
    depth = nodes = 0
    line = 1
    try:
        # events first: building a tree from them is recursive
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            nodes += isinstance(event, yaml.NodeEvent)
            if depth > MOST_DEPTH:
                raise BadInput(f"{source}:{line}: nested deeper than {MOST_DEPTH} levels")
            if nodes > MOST_NODES:
                raise BadInput(f"{source}:{line}: more than {MOST_NODES:,} values")
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise BadInput(f"{source}:{line}: not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(
            f"{source}:{line}: not YAML: a control character, {error.character!r}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(f"{source}:{line}: not YAML: {error}") from error


def parse(text: str, source: str) -> Any:
    """Return the value of a YAML text, within the limits of a recipe. Raises BadInput with
    `source`:line."""
    node = compose(text, source)
    return None if node is None else _Values(source, {}).of(node, ())


class _Values:
    """Turns YAML nodes into plain values, noting each key's line."""

    def __init__(self, source: str, lines: dict[Key, str]) -> None:
        self.source, self.lines = source, lines
        self._count = 0
        self._loader = yaml.SafeLoader("")

    def of(self, node: yaml.Node, at: Key) -> Any:
        """Return a node's value. Raises BadInput: a key given twice or that is no word, aliases
        that multiply, bad scalars."""
        self._count += 1
        where = f"{self.source}:{node.start_mark.line + 1}"
        if self._count > MOST_NODES:  # each use of an alias is a value of its own
            raise BadInput(f"{where}: more than {MOST_NODES:,} values once aliases are followed")
        if len(at) > MOST_DEPTH:  # an alias within what it names never ends
            raise BadInput(
                f"{where}: nested deeper than {MOST_DEPTH} levels once aliases are followed"
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.lines[(*at, i)] = f"{self.source}:{item.start_mark.line + 1}"
            return [self.of(item, (*at, i)) for i, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except (
            yaml.constructor.ConstructorError,
            ValueError,
        ) as error:  # a tag; an impossible date, 5,000 digits
            reason = getattr(error, "problem", None) or str(error)
            raise BadInput(f"{where}: {reason}") from error

    def _mapping(self, node: yaml.MappingNode, at: Key) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where, key = f"{self.source}:{key_node.start_mark.line + 1}", key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadInput(f"{where}: a key is a word, not a list or mapping")
            if not key.isprintable() or len(key) > MOST_KEY:
                raise BadInput(
                    f"{where}: a key is a word of at most {MOST_KEY} printable characters, not "
                    f"{key[:40]!r}"
                )
            key = str(RENAMED.get((*at, key)[-2:], key))
            if key in out:
                raise BadInput(f"{where}: '{key}' is given twice")
            self.lines[(*at, key)] = where
            out[key] = self.of(value_node, (*at, key))
        return out


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = (
            _merged(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else value
        )
    return out


def override(source: dict[str, Any], lines: dict[Key, str], text: str) -> None:
    """Apply "train.epochs=3" to `source` in place; numbers in the path index lists. Raises
    BadInput."""
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise BadInput(f"--set takes KEY=VALUE, as in --set train.epochs=3; got '{text}'")
    arms = source.get("arms")
    if len(keys) > 2 and keys[0] == "arms" and isinstance(arms, dict) and keys[1] not in arms:
        raise BadInput(f"--set {text[:MOST_KEY]}: no arm '{keys[1]}'{nearest(keys[1], arms)}")
    for key in keys:
        if not key.isprintable() or len(key) > MOST_KEY:
            raise BadInput(f"--set takes KEY=VALUE; {key[:40]!r} is no key")
    setting = text if len(text) <= MOST_KEY else text[:MOST_KEY] + "…"
    parsed = parse(value, f"--set {setting}")
    node: Any = source
    for i, key in enumerate(keys[:-1]):
        index = _index(key, node)
        node = (
            node[index]
            if index is not None
            else node.setdefault(key, {})
            if isinstance(node, dict)
            else None
        )
        if not isinstance(node, (dict, list)):
            raise BadInput(f"--set {setting}: '{'.'.join(keys[: i + 1])}' holds no keys")
    keys[-1] = RENAMED.get(tuple(keys[-2:]), keys[-1])
    index = _index(keys[-1], node)
    if isinstance(node, list) and index is None:
        raise BadInput(f"--set {setting}: '{keys[-1]}' is no index of that list of {len(node)}")
    last: Any = keys[-1] if index is None else index
    node[last] = parsed
    lines[tuple(int(k) if _is_number(k) else k for k in keys)] = f"--set {setting}"


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def _index(key: str, node: Any) -> int | None:
    """Return the index a key of --set means in a list, None where it is none."""
    return int(key) if isinstance(node, list) and _is_number(key) and int(key) < len(node) else None
