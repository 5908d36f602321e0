"""A YAML file with inheritance, overrides from the command line, and the line every key stands on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from greenvis.errors import BadInput, nearest

Key = tuple[str | int, ...]


def read(path: Path, below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return a file's values, laid over those of its `extends:` parent, and "file:line" by key path.

    below: the files that led here, to notice a circle. Raises BadInput with file:line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{path}:{line}: not YAML: {error.problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{path}:1: a recipe is a mapping with 'name', 'data', 'model' and 'arms'")
    lines: dict[Key, str] = {(): f"{path}:1"}
    source = _plain(node, path, (), lines)
    parent = source.pop("extends", None)
    if parent is None:
        return source, lines
    if not isinstance(parent, str) or (path.parent / parent).resolve() in {p.resolve() for p in (*below, path)}:
        raise BadInput(
            f"{lines[('extends',)]}: 'extends' takes the path of another recipe, which must not lead back to this one"
        )
    if not (path.parent / parent).is_file():
        raise BadInput(f"{lines[('extends',)]}: no recipe at {path.parent / parent}")
    base, base_lines = read(path.parent / parent, (*below, path))
    return _merged(base, source), base_lines | lines


def _plain(node: yaml.Node, path: Path, at: Key, lines: dict[Key, str]) -> Any:
    """Turn a YAML node into plain values, noting each key's line and refusing a key given twice."""
    if isinstance(node, yaml.MappingNode):
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key in out:
                raise BadInput(f"{path}:{key_node.start_mark.line + 1}: '{key}' is given twice")
            lines[(*at, key)] = f"{path}:{key_node.start_mark.line + 1}"
            out[key] = _plain(value_node, path, (*at, key), lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*at, i)] = f"{path}:{item.start_mark.line + 1}"
        return [_plain(item, path, (*at, i), lines) for i, item in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)
    except yaml.constructor.ConstructorError as error:
        raise BadInput(f"{path}:{node.start_mark.line + 1}: {error.problem}") from error


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def override(source: dict[str, Any], lines: dict[Key, str], text: str) -> None:
    """Apply "train.epochs=3" to `source` in place; numbers in the path index lists. Raises BadInput."""
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise BadInput(f"--set takes KEY=VALUE, as in --set train.epochs=3; got '{text}'")
    arms = source.get("arms")
    if len(keys) > 2 and keys[0] == "arms" and isinstance(arms, dict) and keys[1] not in arms:
        raise BadInput(f"--set {text}: no arm '{keys[1]}'{nearest(keys[1], arms)}")
    place: Any = source
    for i, key in enumerate(keys[:-1]):
        place = place[int(key)] if isinstance(place, list) and key.isdigit() and int(key) < len(place) else (
            place.setdefault(key, {}) if isinstance(place, dict) else None
        )  # fmt: skip
        if not isinstance(place, (dict, list)):
            raise BadInput(f"--set {text}: '{'.'.join(keys[: i + 1])}' holds no keys")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {text}: the value is not YAML: {getattr(error, 'problem', error)}") from error
    if isinstance(place, list):
        if not keys[-1].isdigit() or int(keys[-1]) >= len(place):
            raise BadInput(f"--set {text}: '{keys[-1]}' is no index of that list of {len(place)}")
        place[int(keys[-1])] = parsed
    else:
        place[keys[-1]] = parsed
    lines[tuple(int(k) if k.isdigit() else k for k in keys)] = f"--set {text}"
