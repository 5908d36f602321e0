"""`--set train.lr=0.1,0.01`: one recipe, run once for each of several values of its settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from greenvis.errors import BadInput
from greenvis.recipe import Recipe, load_recipe


def values(text: str) -> list[str]:
    """Return what "KEY=A,B,C" asks for, one value at a time ("KEY=A", …); one alone where it asks for nothing else.

    A list or mapping of YAML, and what stands in quotation marks, is one value. Raises BadInput for an empty one.
    """
    key, equals, given = text.partition("=")
    if not equals or "," not in given or given.strip()[:1] in ("[", "{", '"', "'"):
        return [text]
    parts = [part.strip() for part in given.split(",")]
    if not all(parts):
        raise BadInput(f"--set {text}: a value between the commas is missing; quote a text that has commas of its own")
    return [f"{key}={part}" for part in dict.fromkeys(parts)]


def load(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[Recipe, list[str]]]:
    """Return (recipe, the overrides that make it) for every combination of the values, the last key's turning fastest.

    Of several, each is named after the values it has: "digits.lr-0.1". Raises BadInput as `load_recipe` does.
    """
    choices = [values(text) for text in overrides]
    if all(len(choice) == 1 for choice in choices):
        return [(load_recipe(path, overrides), list(overrides))]
    name = load_recipe(path, [choice[0] for choice in choices]).name
    swept = [i for i, choice in enumerate(choices) if len(choice) > 1]
    keys = [choices[i][0].partition("=")[0] for i in swept]
    last = [key.rpartition(".")[2] for key in keys]
    shown = last if len(set(last)) == len(last) else keys
    out = []
    for chosen in product(*choices):
        its = [f"{key}-{chosen[i].partition('=')[2]}" for key, i in zip(shown, swept, strict=True)]
        called = re.sub(r"[^A-Za-z0-9._-]+", "-", ".".join([name, *its]))
        made = [*chosen, f'name="{called}"']
        out.append((load_recipe(path, made), made))
    return out
