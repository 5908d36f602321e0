"""Which plans fit a model: a file of candidates, filled in for the model, each really attached
before it counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from greenvis import data, models
from greenvis.core import files, yamlfile
from greenvis.data import dataset, images
from greenvis.data.spec import FOLDER
from greenvis.errors import BadInput, GreenvisError, one_line
from greenvis.experiment import lineage
from greenvis.experiment.jobs import Job
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.session import Session
from greenvis.models import structure
from greenvis.planning.rank import weights_of

PLANS = Path(__file__).with_name("advise.yaml")
FEW_LABELS = Path(__file__).with_name("advise-labels.yaml")  # for a budget of labels
MISSING = {
    "$teacher": "no teacher was given (--teacher)",
    "$merge": "its blocks hand no sequence of tokens on",
    "$unlabeled": "no images without a label were given (--unlabeled)",
    "$pretrained": "the model has learned nothing yet that could stay as it is: give a finished "
    "run, or --option pretrained=true",
}
NEEDS = "needs"  # of a plan: a word of `MISSING` that stands nowhere else in it


def source(
    ref: str,
    data_name: str,
    *,
    plans: str | Path | None = None,
    teacher: str | None = None,
    labels: int | None = None,
    unlabeled: str | None = None,
    runs: str | Path = "runs",
    trust: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a recipe with every plan for this model and data as an arm, and the
    plans that lack something.

    ref: a model's reference, "run:RECIPE/ARM" for a finished one below `runs`, or its folder.
    data_name: a data set's name, or a recipe's file, whose data and task it is then. plans: a file
    as greenvis/planning/advise.yaml; None: that one, with `labels` the one for few. teacher: as
    ref. labels: how many training images have one; None: as the data says. unlabeled: "rest", or a
    folder of images without a label. Paths are made absolute. Raises BadInput for a model, data,
    budget or file of plans that cannot be used.
    """
    plans = plans or (PLANS if labels is None else FEW_LABELS)
    content, (section, task) = _plans(Path(plans)), _data(data_name)
    beside = _without_labels(labels, unlabeled)
    if labels is not None:
        section |= {"labels": labels, "unlabeled": "none"}
    data.check(data.DataSpec(**section))
    reference = _reference(ref, runs)
    settings = dict(options or {})
    if isinstance(start := settings.get("pretrained"), str) and Path(start).expanduser().is_file():
        settings["pretrained"] = str(Path(start).expanduser().resolve())
    model = models.build(reference, trust=trust, **settings)
    own = _model(reference, settings)
    filled = _tokens(model) | (
        {"$teacher": _reference(teacher, runs)} if teacher is not None else {}
    )
    if own.get("init") or own.get("pretrained"):
        filled["$pretrained"] = True
    if beside is not None:
        filled["$unlabeled"] = beside
        if "$unlabeled" not in _words(content["arms"]):
            raise BadInput(
                f"no plan of {plans} learns from images without a label, so --unlabeled would "
                "change nothing: leave it out"
            )
    if teacher is not None:
        if "$teacher" not in _words(content["arms"]):
            raise BadInput(
                f"no plan of {plans} learns from a teacher, so --teacher would change nothing: "
                "leave it out"
            )
        models.check(filled["$teacher"], trust=trust)
    arms: dict[str, Any] = {}
    lacking: dict[str, str] = {}
    for name, arm in content["arms"].items():
        missing = [word for word in MISSING if word in _words(arm) and word not in filled]
        if missing:
            lacking[name] = MISSING[missing[0]]
        else:
            arms[name] = _put({k: v for k, v in (arm or {}).items() if k != NEEDS}, filled)
    return {
        "name": "advise-" + _slug(f"{Path(data_name).stem}-{_short(ref)}"),
        **({"task": task} if task else {}),
        "data": {**_shown(reference, model, settings), **section},
        "model": own,
        "train": {"seeds": [0], **content.get("train", {})},
        "arms": arms,
        "meter": {"codecarbon": False},
    }, lacking


def written(
    path: Path,
    content: Mapping[str, Any],
    overrides: Sequence[str] = (),
    comment: Sequence[str] = (),
) -> Recipe:
    """Write a recipe below a comment, and read it back.

    Raises BadInput for what it says, GreenvisError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "".join(f"# {one_line(line)}".rstrip() + "\n" for line in comment)
        files.write(path, head + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise GreenvisError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error
    return load_recipe(path, overrides)


def fitting(session: Session, recipe: Recipe) -> tuple[dict[str, Job], dict[str, str]]:
    """Put every arm on its model for a try; return the jobs of those that work, by name, and why
    the others do not.

    An arm without techniques that fails fails for the model and the data, so it raises BadInput.
    """
    jobs: dict[str, Job] = {}
    refused: dict[str, str] = {}
    for name, spec in recipe.arms.items():
        if spec.subset or spec.stream:
            refused[name] = "a plan with a subset or a stream cannot be tried on a few images"
            continue
        one = recipe.model_copy(update={"arms": {name: spec}})
        try:
            jobs[name] = session.plan(one)[-1]
        except BadInput as error:
            if not (spec.techniques or spec.stages):
                raise
            refused[name] = str(error).removeprefix(recipe.where("arms", name) + ": ")
    if not jobs:
        raise BadInput(
            f"none of these plans fits {recipe.model.ref}: "
            f"{next(iter(refused.values()), 'there is none')}"
        )
    return jobs, refused


def _plans(path: Path) -> dict[str, Any]:
    read = yamlfile.parse(files.read_text(path, "plans", yamlfile.MOST_BYTES), str(path))
    arms = read.get("arms") if isinstance(read, dict) else None
    if not isinstance(arms, dict) or not all(isinstance(arm, dict | None) for arm in arms.values()):
        raise BadInput(
            f"the plans {path} are a recipe's train and arms; it has no arms (see {PLANS})"
        )
    return read


def _without_labels(labels: int | None, unlabeled: str | None) -> str | None:
    """Return what a recipe's `unlabeled` says of a folder, or of the rest; None for None.

    Raises:
        BadInput: With all that is wrong with either.
    """
    wrong, beside = [], None
    if labels is not None and labels < 1:
        wrong.append(f"--labels is {labels}; give how many images have a label, 1 or more")
    if labels is None and unlabeled is not None:
        wrong.append("--unlabeled goes with --labels: give how many images have a label, too")
    if unlabeled == "rest":
        beside = unlabeled
    elif unlabeled is not None:
        folder = Path(unlabeled).expanduser().resolve()
        beside = f"{FOLDER}{folder}"
        try:
            images.readable(folder)
        except BadInput as error:
            wrong.append(f"--unlabeled: {error}")
    if wrong:
        raise BadInput("; ".join(wrong))
    return beside


def _data(name: str) -> tuple[dict[str, Any], Any]:
    """Return the data section that a data set's name, or a recipe's file, means, its paths
    absolute; and the recipe's task, None where it names none."""
    spec, folder, task = data.DataSpec(name=name), Path(), None
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(name)
        spec, folder = recipe.data, recipe.folder
        task = recipe.task if "task" in recipe.model_fields_set else None
    section = dataset.find(spec, folder).located()
    return (
        section.model_dump(mode="json", exclude_unset=True, exclude={"stream", "held_out"}),
        task,
    )


def _reference(ref: str, runs: str | Path) -> str:
    """Return a model's reference; "file:PATH" for what a run left."""
    if ref.startswith("run:") or Path(ref).is_dir():
        return f"file:{weights_of(ref, runs).resolve()}"
    return f"file:{models.file_of(ref)}" if ref.startswith("file:") else ref


def _model(reference: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model section: a file's weights are a start, for a classifier of the new data's
    classes."""
    if not reference.startswith("file:"):
        return {"ref": reference, **settings}
    inner, stored = models.origin(reference, **settings)
    shared = {
        k: v for k, v in stored.items() if k not in ("num_classes", "in_chans") or k in settings
    }
    return {"ref": inner, **shared, "init": reference}


def _shown(reference: str, model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and channels of the images a model is shown: those its run trained on, else what
    the model says."""
    if reference.startswith("file:"):
        try:
            facts = lineage.read_card(models.file_of(reference)).get("data") or {}
        except BadInput:  # no run of greenvis wrote it
            facts = {}
        if facts:
            plain = {} if any(s != 1 for s in facts.get("std") or ()) else {"normalise": False}
            return {"img_size": facts["img_size"], "in_chans": facts["in_chans"], **plain}
    try:
        channels, height, _ = structure.example_input(model).shape[1:]
    except BadInput:  # its forward wants more than images: what it says itself
        return {k: settings[k] for k in ("img_size", "in_chans") if k in settings}
    return {"img_size": settings.get("img_size") or height, "in_chans": channels}


def _tokens(model: nn.Module) -> dict[str, Any]:
    """Return {"$merge": tokens to merge in each block so that half of the patches are gone at the
    end}; {} without tokens."""
    try:
        view = structure.view(model, probe=False)
    except BadInput:  # what cannot be seen; the techniques say so in their own words
        return {}
    shape = (
        view.layouts[view.blocks[0]].inputs
        if view.blocks and view.blocks[0] in view.layouts
        else ()
    )
    if not view.attention or len(shape) != 3:
        return {}
    return {"$merge": max(1, (shape[1] - view.prefix_tokens) // (2 * len(view.blocks)))}


def _words(value: Any) -> set[str]:
    """Return every string that stands in a value's lists and mappings."""
    if isinstance(value, dict):
        return set().union(*map(_words, value.values()))
    if isinstance(value, list):
        return set().union(*map(_words, value))
    return {value} if isinstance(value, str) else set()


def _put(value: Any, filled: Mapping[str, Any]) -> Any:
    """Return the value with each word of `filled` replaced by what it stands for."""
    if isinstance(value, dict):
        return {k: _put(v, filled) for k, v in value.items()}
    if isinstance(value, list):
        return [_put(v, filled) for v in value]
    return filled.get(value, value) if isinstance(value, str) else value


def _short(ref: str) -> str:
    """Return a model's reference in few words, for names of files."""
    path = Path(ref.removeprefix("timm/").rpartition(":")[2])
    return "/".join((path.parent if path.suffix == ".safetensors" else path).parts[-2:])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")
