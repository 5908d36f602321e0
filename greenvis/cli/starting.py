"""`greenvis init`: from your own images to a recipe that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from greenvis.cli import app
from greenvis.cli.app import option, verb
from greenvis.cli.output import answer, write, write_block
from greenvis.errors import BadInput


@verb(app.TRAIN, "greenvis init --images my-folder --out my.yaml")
def init(
    images: Annotated[
        str | None,
        option("folder with one sub-folder per class, a table (CSV), or a data set", "IMAGES"),
    ] = None,
    model: Annotated[
        str | None, option("timm/NAME, torchvision/NAME, hf/NAME …; a small model where absent")
    ] = None,
    goal: Annotated[
        str | None, option("adapt a trained model (the default), or train from the start", "GOAL")
    ] = None,
    out: Annotated[str, option("the recipe to write", "FILE")] = "recipe.yaml",
    as_json: app.Json = False,
) -> None:
    """write a first recipe for your own images, and say all that is wrong with them

    What is left out is asked for where a terminal can answer.
    """
    path = Path(out)
    if path.exists():
        raise BadInput(f"{out} is there already: name another file with --out")
    asking = sys.stdin.isatty() and not as_json
    if images is None and asking:
        images = input("your images (a folder, a table, or a data set's name): ").strip()
        model = model or input("your model (empty: a small one): ").strip() or None
        goal = goal or input("adapt a trained model, or train from the start? [adapt] ").strip()
    if not images:
        raise BadInput("name your images: greenvis init --images FOLDER")
    from greenvis.core import files
    from greenvis.experiment import starter
    from greenvis.experiment.recipe import load_recipe

    seen = starter.look(images, path.parent)
    text = starter.recipe(seen, path.stem, goal or "adapt", model)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
    try:
        load_recipe(path)
    except BadInput:
        path.unlink()
        raise

    def show() -> None:
        write(f"{seen.train} images to train on, {seen.test} to test, {len(seen.classes)} classes")
        if seen.problems:
            write_block(f"left out, as they are broken ({len(seen.problems)}):")
        for problem in seen.problems:
            write(f"- {problem}")
        for note in seen.notes:
            write(f"note: {note}")
        write(f"wrote {out}; train with: greenvis run {out}")

    answer(as_json, {"recipe": out, **starter.as_dict(seen)}, show)
