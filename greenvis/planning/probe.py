"""How good a saved model is: `greenvis probe` makes a recipe of one evaluation an arm for it, and
runs that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from greenvis import models
from greenvis.core import distributed, files, yamlfile
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import lineage, session, sweep
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.run_folder import WEIGHTS_FILE

PROTOCOL = Path(__file__).with_suffix(".yaml")
_DATA = (
    "name",
    "train",
    "test",
    "img_size",
    "in_chans",
    "classes",
    "normalise",
    "seed",
    "root",
    "download",
)


def probe(
    run: str | Path,
    *,
    protocol: str | Path = PROTOCOL,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Path, Recipe]:
    """Evaluate the model that a run left, metered, on the data it was trained on.

    Each seed's recipe is written beside its records. Arms that the model cannot take are left out,
    and said.

    Args:
        run: a run's folder (runs/RECIPE/ARM/seed0), or an arm's, with all its seeds.
        protocol: a file as greenvis/planning/probe.yaml: a recipe without name, data and model,
            whose arms may say `labels`, the share of labels used.
        overrides: of the recipes made ("train.epochs=3").
        runs: folder of the new run records.
        trust: allow models given as package.module:function, which runs their code.
        say: told how the work goes on.

    Returns:
        The folder of the records and the (last) recipe run.

    Raises:
        BadInput: where there is no model with a card.
    """
    distributed.require_single_process("greenvis probe")
    folders = _finished(Path(run))
    arms = _protocol(Path(protocol))
    recipe: Recipe | None = None
    for folder in folders:
        card = lineage.read_card(folder)
        source = _source(card, arms)
        path = _write({**source, "name": sweep.named(source["name"], overrides)}, Path(runs))
        recipe = _usable(load_recipe(path, overrides), folder, trust, say)
        session.run(
            recipe, runs=runs, trust=trust, command=["greenvis", "probe", str(run)], say=say
        )
    assert recipe is not None
    return Path(runs) / recipe.name, recipe


def _finished(run: Path) -> list[Path]:
    """Return the folders of models below an arm's folder, or the run's own. Raises BadInput where
    there is none."""
    folders = (
        [run]
        if (run / WEIGHTS_FILE).is_file()
        else sorted(p.parent for p in run.glob(f"*/{WEIGHTS_FILE}"))
    )
    if not folders:
        raise BadInput(
            f"{run} holds no {WEIGHTS_FILE}: give the folder of a finished run, as "
            "runs/RECIPE/ARM/seed0, or of its arm"
        )
    return folders


def _protocol(path: Path) -> dict[str, Any]:
    read = yamlfile.parse(files.read_text(path, "protocol", yamlfile.MOST_BYTES), str(path))
    if not isinstance(read, dict) or not isinstance(read.get("arms"), dict):
        raise BadInput(
            f"the protocol {path} is a recipe's arms, train and report; it has no arms (see "
            f"{PROTOCOL})"
        )
    return read


def _source(card: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's content: the protocol, for the model and the data of a card."""
    recipe = yamlfile.parse(card["recipe"], f"{card['file']}: the recipe in its card")
    section = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(section, dict):
        raise BadInput(f"{card['file']}: the recipe in its card names no data")
    data = {k: v for k, v in section.items() if k in _DATA}
    facts = card["data"]
    arms = {}
    for name, arm in protocol["arms"].items():
        arm = dict(arm or {})
        if (share := arm.pop("labels", None)) is not None:
            if not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise BadInput(
                    f"the protocol's arm '{name}': labels is {share!r}, but a share of the labels "
                    "is above 0, up to 1"
                )
            arm["subset"] = {
                "per_class": max(1, math.ceil(share * facts["train"] / facts["classes"]))
            }
        arms[name] = arm
    name = "probe-" + card["arm"].replace("/", "-")
    title = f"{card['arm']}: what its features are worth"
    return {
        "name": name,
        "data": data,
        "model": {
            **card["options"],
            "ref": card["ref"],
            "init": f"file:{Path(card['file']).resolve()}",
        },
        "train": {**protocol.get("train", {}), "seeds": [card["seed"]]},
        "arms": arms,
        "report": {"title": title, **protocol.get("report", {})},
    }


def _write(source: dict[str, Any], runs: Path) -> Path:
    """Write a recipe below `runs`, where its records will be."""
    path = runs / source["name"] / f"seed{source['train']['seeds'][0]}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, yaml.safe_dump(source, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise GreenvisError(
            f"cannot write {path}: {error.strerror or error}; choose another folder with --runs"
        ) from error
    return path


def _usable(recipe: Recipe, folder: Path, trust: bool, say: Callable[[str], None]) -> Recipe:
    """Return the recipe without the arms that this model cannot take. Raises BadInput where it can
    take none."""
    model = models.build(f"file:{(folder / WEIGHTS_FILE).resolve()}", trust=trust)
    refused = {}
    for name in recipe.arms:
        try:
            wrap(model, recipe.arm(name).techniques).undo()
        except BadInput as error:
            refused[name] = str(error)
            say(f"{name}: left out: {error}")
    left = {name: spec for name, spec in recipe.arms.items() if name not in refused}
    if not left:
        raise BadInput(
            f"{type(model).__name__} can take no arm of this protocol: "
            f"{next(iter(refused.values()))}"
        )
    base = recipe.baseline if recipe.baseline in left else next(iter(left))
    update = {"arms": left, "report": recipe.report.model_copy(update={"baseline": base})}
    return recipe.model_copy(update=update)
