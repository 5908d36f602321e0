"""The metric a report speaks: its name, unit and direction, as records state them; by its name
alone where they are older or of other hands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from greenvis.core import yamlfile
from greenvis.errors import BadInput
from greenvis.report.facts import Setup, is_number, measures_of
from greenvis.tasks.base import Measure

DEFAULT = "accuracy"  # of records that name no task
LOWER = ("loss", "error", "forgetting", "perplexity", "mae", "mse", "rmse", "distance", "fid")
SHARE = "%"  # unit of a share of 1
SHARES = ("accuracy", "top1", "top5", "f1", "miou", "map", "auc", "recall", "precision")
WRITTEN = {
    "zero_shot": "zero-shot accuracy", "map_50": "mAP at 50 % overlap",
    "miou": "mIoU", "iou": "IoU", "map": "mAP", "auc": "AUC", "f1": "F1", "rmse": "RMSE",
    "mae": "MAE", "mse": "MSE", "fid": "FID", "frechet": "Fréchet distance",
    "class_entropy": "class entropy", "pixel_accuracy": "pixel accuracy",
    "recall_1": "recall@1", "recall_5": "recall@5",
}  # fmt: skip


def named(name: str) -> Measure:
    """Return what a metric is by its name alone ("val_loss", "top1"): a share or a plain number."""
    lower = name.lower().rsplit("_", 1)[-1] in LOWER
    last = name.lower().partition("@")[0]
    unit = SHARE if any(last.endswith(s) for s in SHARES) else ""
    return Measure(name, unit, not lower)


def is_share(measure: Measure) -> bool:
    """Return whether a metric is a share of 1, written in per cent."""
    return measure.unit == SHARE


def written(measure: Measure) -> str:
    """Return a metric's name as the field writes it: "boundary mIoU" for "boundary_miou"."""
    if measure.name in WRITTEN:
        return WRITTEN[measure.name]
    words = measure.name.split("_")
    known = [WRITTEN.get(word, word) for word in words]
    return measure.name if known == words else " ".join(known)


def title(measure: Measure) -> str:
    """Return a metric's name as the head of a column."""
    text = written(measure)
    return text if text[:2] in ("mI", "mA") else text[:1].upper() + text[1:]


def suffix(measure: Measure) -> str:
    """Return what follows a metric's figure: " px"; "" for shares and plain numbers."""
    return "" if measure.unit in ("", SHARE) else f" {measure.unit}"


def best_is(measure: Measure) -> str:
    """Return which end of an axis is good."""
    return "more is better" if measure.higher_is_better else "less is better"


def choose(metric: str | None, runs: Iterable[tuple[Setup, Mapping[str, Any]]]) -> Measure:
    """Return the metric that a report of these runs speaks.

    Args:
        metric: The one asked for; by default what the newest recipe says under `report.metric`,
            else the primary metric of the runs' task, else accuracy.
        runs: Headers and facts of the runs.

    Raises:
        BadInput: Where the runs' tasks are judged by several metrics and none was asked for.
    """
    entries = sorted(runs, key=lambda run: run[0].start_s)
    recipes = [setup.recipe for setup, _ in entries if isinstance(setup.recipe, str)]
    if metric is None and recipes:
        metric = _asked(recipes[-1])
    primary: dict[str, str] = {}
    known: dict[str, Measure] = {}
    for setup, facts in entries:
        measures = measures_of(facts)
        known |= {m.name: m for m in measures}
        if measures:
            primary[measures[0].name] = setup.name
        elif is_number(facts.get(DEFAULT)):
            primary[DEFAULT] = setup.name
    if metric is None and len(primary) > 1:
        names = ", ".join(f"{name} (as in {run})" for name, run in sorted(primary.items()))
        raise BadInput(
            f"these runs are judged by different metrics: {names}; report them apart, or say which "
            "to compare with --metric"
        )
    name = metric or next(iter(primary), DEFAULT)
    return known.get(name) or named(name)


@lru_cache(maxsize=100)
def _asked(recipe: str) -> str | None:
    """Return what a recipe says under `report.metric`."""
    try:
        content = yamlfile.parse(recipe, "its recipe")
    except BadInput:  # a header of other hands
        return None
    section = content.get("report") if isinstance(content, dict) else None
    metric = section.get("metric") if isinstance(section, dict) else None
    return metric if isinstance(metric, str) else None
