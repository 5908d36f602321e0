"""`--set train.lr=0.1,0.01`: one recipe, run once for each of several values of its settings."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from greenvis.errors import BadInput
from greenvis.experiment.recipe import UNHASHED, Recipe, load_recipe

BRACKETS = " []{}'\""
LONGEST = 91  # characters of a name before its digest; a recipe's name has at most 100
MOST = 1000  # recipes of one sweep


def values(text: str) -> list[str]:
    """Return what "KEY=A,B,C" asks for, one value at a time ("KEY=A", …); one alone where it asks
    for nothing else.

    A list or mapping of YAML, and what stands in quotation marks, is one value. Raises BadInput for
    an empty one.
    """
    key, equals, value_text = text.partition("=")
    if not equals or "," not in value_text or value_text.strip()[:1] in ("[", "{", '"', "'"):
        return [text]
    parts = [part.strip() for part in value_text.split(",")]
    if not all(parts):
        raise BadInput(
            f"--set {text}: a value between the commas is missing; quote a text that has commas of "
            "its own"
        )
    return [f"{key}={part}" for part in dict.fromkeys(parts)]


def load(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[Recipe, list[str]]]:
    """Return (recipe, the overrides that make it) for every combination of the values, the last
    key's turning fastest.

    Each is named after the settings it has ("digits.lr-0.1"), so that none takes the place of
    another's records and report. Raises BadInput as `load_recipe` does.
    """
    choices = [values(text) for text in overrides]
    if math.prod(map(len, choices)) > MOST:
        raise BadInput(
            f"--set asks for {math.prod(map(len, choices)):,} recipes; at most {MOST:,} run as one "
            "sweep"
        )
    out = []
    for chosen in product(*choices):
        recipe = load_recipe(path, chosen)
        called = named(
            recipe.name,
            chosen,
            [text for text, choice in zip(chosen, choices, strict=True) if len(choice) > 1],
        )
        made = [*chosen, f'name="{called}"'] if called != recipe.name else [*chosen]
        out.append((load_recipe(path, made) if called != recipe.name else recipe, made))
    return out


def title(path: str | Path, overrides: Sequence[str]) -> str:
    """Return the name of what all the values give together, a sweep's report:
    "digits.lr-0.1-0.01"."""
    name = load_recipe(path, [values(text)[0] for text in overrides]).name
    return named(name, overrides, [text for text in overrides if len(values(text)) > 1])


def named(name: str, overrides: Sequence[str], always: Sequence[str] = ()) -> str:
    """Return a recipe's name with the overrides in it that change what is trained; as it is where
    they give it one.

    always: overrides that are named all the same, a sweep's.
    """
    pairs = [(key, value) for key, _, value in (text.partition("=") for text in overrides)]
    swept = {text.partition("=")[0] for text in always}
    own = any(key == "name" for key, _ in pairs)
    shown = {key: value for key, value in pairs if key in swept or not (own or _is_aside(key))}
    last = [key.rpartition(".")[2] for key in shown]
    keys = last if len(set(last)) == len(last) else [*shown]
    parts = [
        f"{key}-{value.strip(BRACKETS)}" for key, value in zip(keys, shown.values(), strict=True)
    ]
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", ".".join([name, *parts])).rstrip("-")
    if len(called) <= LONGEST:
        return called
    return f"{called[:LONGEST]}-{hashlib.sha256(called.encode()).hexdigest()[:8]}"


def _is_aside(key: str) -> bool:
    """Whether a setting changes nothing that is trained: where and how it runs, what its report
    says, which seeds."""
    parts = key.split(".")
    of_training = parts[-1] in UNHASHED and parts[-2:-1] == ["train"]
    return (
        parts[0] in ("name", "report", "meter")
        or key in ("data.root", "data.download")
        or of_training
    )
