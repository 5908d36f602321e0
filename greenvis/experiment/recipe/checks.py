"""What is wrong with a recipe although each of its fields is right: settings that change nothing,
models that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from greenvis.errors import BadInput, nearest
from greenvis.experiment import model_names

if TYPE_CHECKING:
    from greenvis.experiment.recipe.arms import Arm
    from greenvis.experiment.recipe.recipe import Recipe


def _kind(arm: Arm) -> str:
    return "" if arm.stream is None else arm.stream.kind


def refuse_unknown_models(source: Mapping[str, Any], where: Callable[..., str]) -> None:
    """Raise BadInput for a model that timm or torchvision does not have.

    Args:
        source: a recipe as it was read; it may be wrong in any other way.
        where: file and line of a key.
    """
    arms = source.get("arms")
    keys = [("arms", name, "model") for name in arms] if isinstance(arms, Mapping) else []
    for key in [("model",), *keys]:
        value: Any = source
        for part in (*key, "ref"):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and (why := model_names.unknown(value)):
            raise BadInput(f"{where(*key, 'ref')}: {why}")


IDLE: tuple[tuple[str, str, Callable[[Arm], bool], str], ...] = (
    # a setting that changes nothing but beside what is said of another: where it is set, its name,
    # the test, the words
    ("train", "momentum", lambda arm: arm.train.optimizer == "sgd", "it is of optimizer: sgd"),
    (
        "train",
        "target",
        lambda arm: bool(arm.train.eval_every),
        "eval_every is 0, so it is not looked at on the way",
    ),
    (
        "model",
        "classifier",
        lambda arm: bool(arm.model.starts),
        "it is of weights to start from, and init names none",
    ),
    (
        "model",
        "average_norms",
        lambda arm: bool(arm.model.average),
        "it is of an average, and none is asked for",
    ),
    ("stream", "domain", lambda arm: _kind(arm) == "domain", "it is of kind: domain"),
    ("stream", "blur", lambda arm: _kind(arm) == "free", "it is of kind: free"),
)


def refuse_active(recipe: Recipe, arm: Arm) -> None:
    """Raise BadInput where labels are bought in rounds, and what stands beside knows no rounds."""
    if arm.active is None:
        return
    spec = recipe.arms[arm.name]
    beside = {
        "stages": spec.stages,
        "subset": arm.subset,
        "synthesis": arm.synthesis,
        "data.stream": arm.stream,
        "data.labels": arm.data.labels is not None,
        "train.target": arm.train.target is not None,
    }
    where = recipe.where("arms", arm.name, "active")
    if wrong := [name for name, present in beside.items() if present]:
        hint = {
            "data.labels": "active says how many labels there are; set `data: {labels: null}` in "
            "this arm",
            "train.target": "it would end the first round; leave it out",
        }.get(wrong[0], "leave one of them out")
        raise BadInput(f"{where}: an arm has active or {wrong[0]}, not both: {hint}")
    if arm.task.form != "classification":
        raise BadInput(
            f"{where}: active buys classes of images, and the task is '{arm.task.name}': leave it "
            "out"
        )


def refuse_synthesis(recipe: Recipe, arm: Arm) -> None:
    """Raise BadInput where images are made for scarce classes, and what stands beside has others
    yet."""
    beside = {"subset": arm.subset, "data.stream": arm.stream}
    if arm.synthesis is not None and (wrong := [n for n, present in beside.items() if present]):
        where = recipe.where("arms", arm.name, "synthesis")
        raise BadInput(f"{where}: an arm has synthesis or {wrong[0]}, not both")


def refuse_search(recipe: Recipe, arm: Arm) -> None:
    """Raise BadInput where a structure is searched, and what stands beside trains in parts of its
    own, or nothing is held out to judge trials on."""
    if arm.search is None:
        return
    where = recipe.where("arms", arm.name, "search")
    beside = {
        "stages": recipe.arms[arm.name].stages,
        "active": arm.active,
        "data.stream": arm.stream,
    }
    if wrong := [name for name, present in beside.items() if present]:
        raise BadInput(f"{where}: an arm has search or {wrong[0]}, not both")
    if not arm.data.held_out:
        raise BadInput(
            f"{where}: trials are judged on images that no training sees: set data.held_out"
        )


def refuse_unknown_metric(recipe: Recipe) -> None:
    """Raise BadInput for a metric or a target that the recipe's task does not have."""
    arms = {name: recipe.arm(name) for name in recipe.arms}
    task = next(iter(arms.values())).task
    known = (
        None if task.secondary is None else [task.primary.name, *(m.name for m in task.secondary)]
    )
    metric = recipe.report.metric
    if metric is not None and known is not None and metric not in known:
        raise BadInput(
            f"{recipe.where('report', 'metric')}: task '{task.name}' has no metric '{metric}'"
            f"{nearest(metric, known)}"
        )
    share = task.primary.unit == "%"
    for name, arm in arms.items():
        target = arm.train.target
        if share and target is not None and not 0 < target <= 1:
            own = ("arms", name, "train") if "target" in recipe.arms[name].train else ("train",)
            hint = f": {target:g} % is {target / 100:g}" if 1 < target <= 100 else ""
            raise BadInput(
                f"{recipe.where(*own, 'target')}: train.target is {target:g}, and "
                f"{task.primary.name} is a share, above 0 and up to 1{hint}"
            )


def refuse_idle(recipe: Recipe) -> None:
    """Raise BadInput for a setting that changes nothing: an arm's in that arm, the recipe's in all
    that leave it as it is."""
    arms = {name: (spec, recipe.arm(name)) for name, spec in recipe.arms.items()}
    for section, name, counts, why in IDLE:
        top = recipe.data.stream if section == "stream" else getattr(recipe, section)
        for at, (spec, arm) in arms.items():
            if getattr(spec, section).get(name) is not None and not any(
                map(counts, (arm, *arm.stages))
            ):
                where = recipe.where("arms", at, section, name)
                raise BadInput(f"{where}: {section}.{name} changes nothing in arm '{at}': {why}")
        rest = [arm for spec, arm in arms.values() if name not in getattr(spec, section)]
        if (
            top is None
            or name not in top.model_fields_set
            or getattr(top, name) is None
            or not rest
        ):
            continue
        if not any(counts(each) for arm in rest for each in (arm, *arm.stages)):
            above = ("data", "stream") if section == "stream" else (section,)
            raise BadInput(
                f"{recipe.where(*above, name)}: {'.'.join((*above, name))} changes nothing in any "
                f"arm: {why}"
            )
