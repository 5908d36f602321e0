"""Which way to train a model for new data, before it is paid for: every plan that fits is tried on
a few images."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import yaml

from greenvis.core import distributed, files
from greenvis.errors import BadInput, nearest
from greenvis.experiment.jobs import Job
from greenvis.experiment.run_folder import locked
from greenvis.experiment.session import Session
from greenvis.planning import candidates
from greenvis.planning.trials import Trials, points
from greenvis.report import formatting, measures
from greenvis.report.stats import pareto
from greenvis.tasks.base import Measure

SERVED = 1_000_000  # images a model will answer, where nobody says
# without a target: how much of the metric to give up for energy, a share's own or else of its value
CLOSE = 0.01
SCALES = {"mWh": 3.6, "Wh": 3.6e3, "kWh": 3.6e6, "J": 1.0, "kJ": 1e3, "MJ": 1e6}
ACCURACY = Measure("accuracy")
PLANS_FILE = "plans.yaml"
MADE = "# Written by `greenvis advise"


class Advice(TypedDict):
    """What `advise` returns. Figures are {"value", "low", "high"}.

    rows: by total energy, {"plan", "metric", "train_energy_j", "serve_energy_j" (of 1,000 images),
    "total_energy_j", "front", "trials"}; refused: the other plans, with the reason; pick: the plan
    to take, None where none is, and why; recipe: its file, None without one; plans: a recipe of all
    that fit.

    trials_expected_j: what the trials were said to take before, trials_energy_j: what they took;
    images: of the whole training; held: images that each trial was tested on; labels: as asked;
    unlabeled: how many images without a label; measure: "name", "unit", "higher_is_better" of the
    metric; unit: what is served.
    """

    rows: list[dict[str, Any]]
    refused: dict[str, str]
    pick: str | None
    why: str
    recipe: str | None
    plans: str
    trials_expected_j: float | None
    trials_energy_j: float
    model: str
    data: str
    images: int
    held: int
    labels: int | None
    unlabeled: int
    serve: float
    target: float | None
    budget_j: float | None
    measure: dict[str, Any]
    unit: str


def advise(
    model: str,
    data_name: str,
    *,
    target: float | None = None,
    budget: str | float | None = None,
    serve: float = SERVED,
    teacher: str | None = None,
    labels: int | None = None,
    unlabeled: str | None = None,
    plans: str | Path | None = None,
    share: float | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    fresh: bool = False,
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Advice:
    """Predict the task's primary metric, and the energy, of every plan that fits a model and data;
    write the recipe of the one to take.

    Plans train on a share of the training images and are tested on others of them, not on the test
    images; `planning.extrapolate` predicts the whole training, `choose` takes a plan.

    Args:
        model: a model reference; see `candidates.source`.
        data_name: a data set by name, or a recipe's file, whose data and task it is then.
        target: of the task's primary metric, in its unit; from above where less is better.
        budget: joules, or "5Wh", that training and serving may take together.
        serve: images (bags, …: what the task serves) the model will answer.
        teacher: a trained model to learn from.
        labels: how many training images have a label, where that is a budget.
        unlabeled: a folder of images without a label, or "rest" of the training images.
        plans: a file of plans to weigh; None: greenvis's own, with `labels` those for few.
        share: of the training images, in the longest trial; None: as `trials` has it.
        out: where to write the recipe (default: below `runs`); only advice is replaced.
        overrides: of the recipe ("train.epochs=3").
        runs: folder of run records.
        fresh: try again what was tried before.
        trust: allow models given as package.module:function, which runs their code.
        say: told how the work goes on.
        options: of the model.

    Returns:
        What to do, and what that rests on.

    Raises:
        BadInput: before anything is spent.
    """
    most = None if budget is None else joules(budget)
    _check(serve, share, out)
    content, refused = candidates.source(
        model, data_name, plans=plans, teacher=teacher, labels=labels, unlabeled=unlabeled,
        runs=runs, trust=trust, options=options,
    )  # fmt: skip
    session = Session(Path(runs), trust, ("greenvis", "advise", model), say)
    folder = Path(runs) / content["name"]
    with locked(folder):
        jobs, all_plans, unfit = _fitting(session, folder, content, overrides, target)
        trials = Trials(session, jobs, share=share, few=labels is not None, fresh=fresh, say=say)
        ahead = trials.announce()
        trials.run(serve)
    advice: Any = {
        "model": model, "data": data_name, "labels": labels, "serve": serve, "target": target,
        "budget_j": most, "plans": str(folder / PLANS_FILE), "trials_expected_j": ahead,
        "refused": {**refused, **unfit, **trials.failed}, **_taken(trials, serve, target, most),
    }  # fmt: skip
    path = out or folder / "recipe.yaml"
    advice["recipe"] = _write(path, all_plans, content["name"], advice, unlabeled)
    return advice


def _taken(
    trials: Trials, serve: float, target: float | None, budget_j: float | None
) -> dict[str, Any]:
    """Return the plan to take and what the trials say of all, as `Advice` has it."""
    measure, rows = trials.task.primary, _rows(trials, serve)
    pick, why = choose(rows, target, budget_j, measure)
    each = [trial for tried in trials.results.values() for trial in tried]
    return {
        "rows": rows,
        "pick": pick,
        "why": why,
        "recipe": None,
        "trials_energy_j": math.fsum(trial.total_j for trial in each),
        "images": trials.images,
        "held": len(trials.held),
        "unlabeled": trials.unlabeled,
        "measure": measure._asdict(),
        "unit": trials.task.unit,
    }


def _fitting(
    session: Session,
    folder: Path,
    content: Mapping[str, Any],
    overrides: Sequence[str],
    target: float | None,
) -> tuple[dict[str, Job], dict[str, Any], dict[str, str]]:
    """Write the plans that fit as a recipe; return their trials' jobs, the recipe's content, and
    why the others do not fit."""
    name, file = content["name"], folder / PLANS_FILE
    recipe = candidates.written(file, {**content, "name": f"{name}-plans"}, overrides)
    _check_target(target, recipe.arm(next(iter(recipe.arms))).task.primary)
    jobs, unfit = candidates.fitting(session, recipe.model_copy(update={"name": f"{name}-trials"}))
    plans = yaml.safe_load(recipe.text())
    plans["arms"] = {plan: arm for plan, arm in plans["arms"].items() if plan in jobs}
    candidates.written(file, plans)
    return jobs, plans, unfit


def _rows(trials: Trials, serve: float) -> list[dict[str, Any]]:
    """Return what is predicted of each plan, in order of total energy, and whether it is on the
    Pareto front."""
    forecasts = {plan: trials.predicted(plan, serve) for plan in trials.results}
    at = points(forecasts, trials.task.primary)
    front = pareto(at)
    return [
        {
            "plan": plan,
            **forecasts[plan],
            "front": plan in front,
            "trials": [asdict(trial) for trial in trials.results[plan]],
        }
        for plan in sorted(at, key=lambda plan: at[plan][0])
    ]


def choose(
    rows: Sequence[Mapping[str, Any]],
    target: float | None = None,
    budget_j: float | None = None,
    measure: Measure = ACCURACY,
) -> tuple[str | None, str]:
    """Return the plan to take and why, by predicted values: the cheapest of those that reach the
    target within the budget.

    Without a target it is `CLOSE` short of the best plan that the budget allows. Where none reaches
    the target, the best is taken; where none keeps to the budget, none is.

    Args:
        rows: As `advise` returns them.
        target: Of the metric, in its unit.
        budget_j: Joules of training and serving together.
        measure: What the metric is.
    """
    sign = 1 if measure.higher_is_better else -1

    def cost(row: Mapping[str, Any]) -> float:
        return row["total_energy_j"]["value"]

    def gain(row: Mapping[str, Any], bound: str = "value") -> float:
        return sign * row["metric"][bound]

    within = [row for row in rows if budget_j is None or cost(row) <= budget_j]
    if not within:
        least = min(rows, key=cost)
        return None, (
            f"no plan is predicted to keep to {budget_j:,.0f} J; the cheapest, {least['plan']}, "
            f"takes {cost(least):,.0f} J: "
            "raise the budget, or serve less"
        )
    best = max(within, key=gain)
    share = measures.is_share(measure)
    if target is None:
        slack = CLOSE * (1 if share else abs(gain(best)))
        pick = min((row for row in within if gain(row) >= gain(best) - slack), key=cost)
        close = f"{CLOSE * 100:g} point" if share else f"{CLOSE:.0%}"
        return pick["plan"], (
            f"the cheapest within {close} of the plan that is best by "
            f"{measures.written(measure)}, {best['plan']}"
        )
    goal = f"{measures.written(measure)} {formatting.gain(measure, target)}"
    reach = [row for row in within if gain(row) >= sign * target]
    if not reach:
        where = " within the budget" if budget_j is not None else ""
        why = f"no plan is predicted to reach {goal}{where}; {best['plan']} comes closest"
        return best["plan"], why
    pick = min(reach, key=cost)
    worst = gain(pick, "low" if measure.higher_is_better else "high")
    sure = "" if worst >= sign * target else "; its range does not lie there, so it may miss it"
    return pick["plan"], f"the cheapest that is predicted to reach {goal}{sure}"


def joules(energy: str | float) -> float:
    """Return an energy in joules: a number of them, or a text with a unit, as "5Wh", "0.2 kWh" or
    "18kJ". Raises BadInput."""
    text = str(energy).strip()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(number) :] or "J"
    if unit not in SCALES:
        raise BadInput(f"the budget '{energy}' has no unit of energy{nearest(unit, SCALES)}")
    try:
        value = float(number) * SCALES[unit]
    except ValueError:
        raise BadInput(
            f"the budget '{energy}' is no energy: give a number and a unit, as 5Wh, 0.2kWh or 18kJ"
        ) from None
    if not (value > 0 and math.isfinite(value)):
        raise BadInput(f"the budget is {energy}; it must be above 0")
    return value


def _check_target(target: float | None, measure: Measure) -> None:
    name = measures.written(measure)
    if target is None or (target > 0 and (not measures.is_share(measure) or target <= 1)):
        return
    hint = f"; {target:g} % is {target / 100:g}" if 1 < target <= 100 else ""
    kind = "a share, above 0 and up to 1" if measures.is_share(measure) else "above 0"
    raise BadInput(f"the target is {target:g}, and {name} is {kind}{hint}")


def _check(serve: float, share: float | None, out: str | Path | None) -> None:
    distributed.require_single_process("greenvis advise")
    if not (serve >= 0 and math.isfinite(serve)):
        raise BadInput(f"serve is {serve:g}; it is a number of images, 0 or more")
    if share is not None and not 0 < share <= 0.5:
        raise BadInput(
            f"share is {share:g}; the longest trial takes a share of the training images above 0, "
            "up to 0.5"
        )
    if out is None:
        return
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(
            f"cannot write a recipe to {path}: "
            f"{'that is' if path.is_dir() else f'{path.parent} is not'} a folder"
        )
    if path.exists() and not files.read_text(path, "recipe").startswith(MADE):
        raise BadInput(
            f"{path} is there and no advice wrote it; give another name with --out, or move it away"
        )


def _write(
    path: str | Path, all_plans: Mapping[str, Any], name: str, advice: Advice, unlabeled: str | None
) -> str | None:
    """Write the recipe of the plan that is taken; None where none is."""
    row = next((row for row in advice["rows"] if row["plan"] == advice["pick"]), None)
    if row is None:
        return None
    metric, spent, served = (row[key] for key in ("metric", "train_energy_j", "serve_energy_j"))
    measure = Measure(**advice["measure"])
    value, low, high = (formatting.gain(measure, metric[k]) for k in ("value", "low", "high"))
    options = {"data": advice["data"], "labels": advice["labels"], "unlabeled": unlabeled}
    asked = [w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))]
    lines = (
        f"{MADE.removeprefix('# ')} {shlex.join([advice['model'], *asked])}`: {advice['why']}.",
        f"Predicted: {measures.written(measure)} {value} ({low} to {high}), training "
        f"{spent['value']:.0f} J ({spent['low']:.0f} to {spent['high']:.0f}), "
        f"serving {served['value']:.2f} J per 1,000 {formatting.plural(advice['unit'])}.",
        "",
        f"  greenvis run {shlex.quote(str(path))}",
    )
    content = {**all_plans, "name": name, "arms": {row["plan"]: all_plans["arms"][row["plan"]]}}
    candidates.written(Path(path), content, comment=lines)
    return str(path)
