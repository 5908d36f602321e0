"""Choosing a base before paying for it: score every candidate's features on the new data, and say
what that cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau, weightedtau
from torch import nn

from greenvis import data, models
from greenvis.errors import BadInput, GreenvisError, nearest, some
from greenvis.experiment import knn
from greenvis.experiment.recipe import UNHASHED, load_recipe
from greenvis.experiment.run_folder import WEIGHTS_FILE
from greenvis.meters import pricing, record
from greenvis.meters.track import Tracker, track
from greenvis.models import structure
from greenvis.planning import transfer
from greenvis.planning.transfer import SCORES
from greenvis.report.facts import measures_of
from greenvis.report.measures import written

METHODS = (*SCORES, "ped")  # ped: LogME once classes that overlap have parted
LEAST = 3  # bases that must have been fine-tuned before a rank correlation says anything
IMAGES, BATCH = 1000, 100


def rank(
    bases: Sequence[str],
    data_name: str,
    *,
    images: int = IMAGES,
    by: str = "logme",
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """Rank candidate bases for new data without training, best first. The ranking is a tracked run
    itself.

    Args:
        bases: model references; "run:RECIPE/ARM" for what a recipe's arm left below `runs`, or its
            folder.
        data_name: a data set's name, or a recipe's file, whose data it is then; its task is
            classification, for the scores are of how features tell classes apart.
        images: training images shown to each base (fewer where there are fewer).
        by: the score to sort by, one of `METHODS`.
        runs: folder of run records.
        trust: allow models given as package.module:function, which runs their code.
        say: told how the work goes on.
        options: of bases that are a library's (pretrained, img_size, …).

    Returns:
        {"rows": [{"base", "rank", one score per method, "dim", "energy_j", and, where full
        fine-tuning of these bases on this data is on record, "tuned_accuracy" and
        "tuning_energy_j"}], "correlation": {method: {"weighted_tau", "tau", "bases"}} or None,
        "energy_j": {"value", "low", "high"} of the whole ranking, "tuning_energy_j", "record", …}.

    Raises:
        BadInput: for an unknown base, data set or score, or another task, before anything is spent.
    """
    _check(bases, by, options)
    spec, folder = _data(data_name)
    built = {base: _build(base, Path(runs), trust, options) for base in bases}
    shapes = {base: _shape(base, model, Path(runs), options) for base, model in built.items()}
    shown = {
        shape: _images(spec, folder, shape, images) for shape in dict.fromkeys(shapes.values())
    }
    rows: list[dict[str, Any]] = []
    with track("rank", dir=runs, quiet=True) as run:
        for number, (base, model) in enumerate(built.items(), 1):
            say(f"{base}: features of {len(shown[shapes[base]].train)} images")
            with run.phase(f"base{number}"):
                rows.append({"base": base, **_scores(model, shown[shapes[base]].train, run)})
        run.fact(bases=list(bases), data=next(iter(shown.values())).facts())
    left = record.read(run.path)
    for number, row in enumerate(rows, 1):
        row["energy_j"] = pricing.run_energy(left, f"base{number}").value
    tuned = tuned_on_record(runs, bases, next(iter(shown.values())), options)
    rows = [{**row, **tuned.get(row["base"], {})} for row in rows]
    rows.sort(key=lambda row: -row[by])
    tuning = [row["tuning_energy_j"] for row in rows if row.get("tuning_energy_j") is not None]
    return {
        "rows": [{"rank": position, **row} for position, row in enumerate(rows, 1)],
        "by": by,
        "data": data_name,
        "images": max(len(part.train) for part in shown.values()),
        "correlation": correlation([row for row in rows if "tuned_accuracy" in row]),
        "energy_j": pricing.reading(run.energy()),
        "tuning_energy_j": sum(tuning) if len(tuning) == len(rows) else None,
        "record": str(run.path),
    }


def _check(bases: Sequence[str], by: str, options: Mapping[str, Any]) -> None:
    if by not in METHODS:
        raise BadInput(f"cannot rank by '{by}'{nearest(by, METHODS)}")
    if len(set(bases)) < 2:
        raise BadInput(
            f"ranking takes two bases or more, each once, not {len(set(bases))}: greenvis rank "
            "BASE BASE …"
        )
    if len(set(bases)) != len(bases):
        raise BadInput("a base is listed twice; list each once")
    if options and all(_arm(base) is not None or base.startswith("file:") for base in bases):
        raise BadInput(
            f"{some(options)} would change none of these bases: options are for those of a library"
        )


def correlation(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Return each score's rank correlation with the accuracies "tuned_accuracy" of the same rows;
    None for under three.

    weighted_tau: Kendall's with the best bases weighing most, as the papers report it; tau:
    Kendall's plain one. Both 1 where the orders agree, -1 where they are reversed.
    """
    if len(rows) < LEAST:
        return None
    truth = [row["tuned_accuracy"] for row in rows]
    out: dict[str, dict[str, float]] = {}
    for method in METHODS:
        scores = [row[method] for row in rows]
        weighted: Any = weightedtau(truth, scores)
        plain: Any = kendalltau(truth, scores)
        out[method] = {
            "weighted_tau": float(weighted.statistic),
            "tau": float(plain.statistic),
            "bases": len(rows),
        }
    return out


def tuned_on_record(
    runs: str | Path, bases: Sequence[str], images: data.Data, options: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return {"tuned_accuracy", "tuning_energy_j"} by base, means over seeds, of full fine-tuning
    on this data on record.

    Finished runs count that start from a base's weights, train all of it with no technique and on
    the same classes of the same data; of several such settings of data and training, the one that
    most of the bases had, and all have.
    """
    by_setting: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}
    for path in record.find([runs]) if Path(runs).is_dir() else ():
        try:
            run = record.read(path)
        except GreenvisError:  # another's file, or one of a newer schema
            continue
        base = _base_of(run, bases, options)
        facts = run.facts.get("data") or {}
        same = (
            facts.get("checksum") == images.checksum and facts.get("only") == images.facts()["only"]
        )
        measures = measures_of(run.facts)  # none in records that name no task
        other = measures and measures[0].name != "accuracy"
        if base is None or run.status != "done" or not same or other:
            continue
        if run.facts.get("accuracy") is None:
            continue
        train = {k: v for k, v in (run.facts.get("train") or {}).items() if k not in UNHASHED}
        setting = json.dumps([facts, train], sort_keys=True, default=str)
        seeds = by_setting.setdefault(setting, {}).setdefault(base, {})
        seeds[int(run.header.get("seed", 0))] = (
            run.facts["accuracy"],
            pricing.run_energy(run, "train").value,
        )
    if not by_setting:
        return {}
    out: dict[str, dict[str, float]] = {}
    for base, seeds in max(by_setting.values(), key=len).items():
        spent = [energy for _, energy in seeds.values() if energy is not None]
        out[base] = {"tuned_accuracy": sum(accuracy for accuracy, _ in seeds.values()) / len(seeds)}
        out[base] |= {"tuning_energy_j": sum(spent) / len(spent)} if spent else {}
    return out


def _base_of(run: record.Run, bases: Sequence[str], options: Mapping[str, Any]) -> str | None:
    """Return which of the bases a run fine-tuned, None where it did something else."""
    model = run.facts.get("model") or {}
    if run.facts.get("techniques") or run.facts.get("stages"):
        return None
    if str(model.get("init") or "").startswith("run:"):
        used = next((u.get("name") for u in run.uses if u.get("role") == "base"), None)
        return next((base for base in bases if used is not None and _arm(base) == used), None)
    pretrained = (model.get("options") or {}).get("pretrained")
    alike = pretrained and pretrained == options.get("pretrained") and not model.get("init")
    return model.get("ref") if alike and model.get("ref") in bases else None


def _build(base: str, runs: Path, trust: bool, options: Mapping[str, Any]) -> nn.Module:
    if _arm(base) is not None:
        return models.build(f"file:{weights_of(base, runs).resolve()}", trust=trust).eval()
    own = {} if base.startswith("file:") else options
    return models.build(base, trust=trust, **own).eval()


def _arm(base: str) -> str | None:
    """Return RECIPE/ARM of a base that an arm left; None for other models."""
    if base.startswith("run:"):
        return "/".join(base.removeprefix("run:").split("/")[:2])
    return (
        "/".join(Path(base).resolve().parts[-3:-1])
        if (Path(base) / WEIGHTS_FILE).is_file()
        else None
    )


def _shape(base: str, model: nn.Module, runs: Path, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return (channels, height, width) of the images a base is shown: those a run trained on, else
    what it is asked for or says.
    """
    if _arm(base) is not None:
        for run in record.readable([weights_of(base, runs).parent]):
            if facts := run.facts.get("data"):
                return facts["in_chans"], facts["img_size"], facts["img_size"]
    size = None if base.startswith("file:") else options.get("img_size")
    return tuple(structure.example_input(model, size=size).shape[1:])


def weights_of(base: str, runs: str | Path) -> Path:
    """Return the weights that "run:RECIPE/ARM" left below `runs`, of its first seed; of a folder,
    those in it.

    Raises BadInput where there are none.
    """
    folder = Path(runs) / base.removeprefix("run:") if base.startswith("run:") else Path(base)
    weights = sorted([*folder.glob(WEIGHTS_FILE), *folder.glob(f"seed*/{WEIGHTS_FILE}")])
    if not weights:
        known = sorted(
            {
                f"run:{p.parent.parent.relative_to(runs)}"
                for p in Path(runs).glob(f"*/*/seed*/{WEIGHTS_FILE}")
            }
        )
        raise BadInput(f"'{base}' left no {WEIGHTS_FILE} below {runs}{nearest(base, known)}")
    return weights[0]


def _data(name: str) -> tuple[data.DataSpec, Path]:
    """Return what a data set's name, or a recipe's file, asks for, and what its paths start
    from."""
    if name.endswith((".yaml", ".yml")):
        recipe = load_recipe(name)
        task = recipe.arm(next(iter(recipe.arms))).task
        if task.form != "classification":
            raise BadInput(
                f"{name} is of task '{task.name}', and these scores say how well features tell "
                "classes apart, one an image: they do not order bases for its "
                f"{written(task.primary)}; try the bases for a few epochs instead (greenvis "
                "advise BASE)"
            )
        return recipe.data, recipe.folder
    return data.DataSpec(name=name), Path()


def _images(spec: data.DataSpec, folder: Path, shape: tuple[int, ...], most: int) -> data.Data:
    """Return at most `most` training images, unchanged ones, as a model of this input shape takes
    them."""
    asked: dict[str, Any] = {
        **spec.model_dump(exclude={"stream", "held_out"}),
        "in_chans": shape[0],
        "img_size": shape[1],
        "augment": "none",
        "views": None,
    }
    try:
        few = data.DataSpec(**{**asked, "train": min(spec.train or most, most)})
        images = data.load(few, folder)
    except BadInput:  # fewer images than asked for: all of them
        images = data.load(data.DataSpec(**asked), folder)
    images.train.classes("a score of bases")
    return images


def _scores(model: nn.Module, images: data.ImageSet, run: Tracker) -> dict[str, Any]:
    """Return every score of a base's features on these images, and their dimension."""
    loader = data.batches(images, BATCH)
    features, labels = knn.features(model, run.steps(loader, phase="features", progress=False))
    x, y = features.cpu().numpy(), labels.cpu().numpy()
    scores: dict[str, Any] = {}
    for method, score in SCORES.items():
        with run.phase(method):
            scores[method] = score(x, y)
    with run.phase("ped"):
        scores["ped"] = transfer.logme(transfer.ped(x, y), y)
    return {**scores, "dim": x.shape[1]}
