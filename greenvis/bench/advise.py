"""`greenvis bench advise`: is the plan that advice takes the cheapest? All plans are run. A quarter
of an hour on one core.

Bases that are not trained yet are (recipes/peft/base.yaml, recipes/reuse/rank-bases.yaml). Finished
trials and runs are kept.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis.bench import _floor, _output
from greenvis.bench._options import Out, Runs
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.experiment.recipe import load_recipe
from greenvis.meters import pricing, record, serving
from greenvis.meters.header import cpu
from greenvis.planning.advise import advise, choose
from greenvis.planning.candidates import PLANS
from greenvis.report.formatting import si

RECIPES = Path(__file__).parents[2] / "recipes"
# the model, its options, the recipe that trains it if one does, how many images it learns from
Host = tuple[str, dict[str, Any], Path | None, int]
HOSTS: dict[str, Host] = {
    "vit": ("run:peft-base/base", {}, RECIPES / "peft/base.yaml", 800),
    "resnet10t": ("run:rank-bases/resnet", {}, RECIPES / "reuse/rank-bases.yaml", 800),
    "efficientnet-lite0": (
        "timm/tf_efficientnet_lite0",
        {"pretrained": "efficientnet-lite0", "img_size": 32},
        None,
        400,
    ),
}
DATA: dict[str, tuple[str, ...]] = {  # none of it did a base learn
    "fashion-mnist": ("data.classes=[5,6,7,8,9]", "data.test=500"),
    "digits": ("data.test=450",),
}
TRAIN = ("train.epochs=4", "train.threads=1")
SERVED = 10_000
GIVEN_UP = 0.01  # the target: what plain fine-tuning reaches, less this
PREDICTED = ("accuracy", "train_energy_j", "serve_energy_j", "total_energy_j")
FAIR = 0.1  # a regret up to here is fine


def run(
    out: Out = None,
    hosts: Mapping[str, Host] = HOSTS,
    data: Mapping[str, Sequence[str]] = DATA,
    overrides: Sequence[str] = TRAIN,
    plans: str | Path = PLANS,
    runs: Runs = "runs",
) -> dict[str, Any]:
    """Return {"rows": [{"host", "data", "target", "pick", "best", "regret", …}], "cells", …}: a row
    for each cell.

    A cell is a host and a data set: advice is asked for, every plan that fits is trained on all the
    images, and the plan that advice takes for a target is set against the cheapest that reached it.
    regret: energy of training and serving of the one over that of the other, less 1; None where the
    pick missed the target. overrides: of all recipes. out: a folder to write report.md and
    results.json to. Raises BadInput where the recipes of bases are not there (they come with the
    repository).
    """
    cells, folders = [], []
    for ref, _, recipe, _ in hosts.values():
        if recipe is not None:
            _train_base(ref, recipe, runs)
    for host, (ref, options, _, images) in hosts.items():
        for name, own in data.items():
            own = [*own, f"data.train={images}", *overrides]
            advice = advise(
                ref, name, serve=SERVED, plans=plans, overrides=own, runs=runs, **options
            )
            every = load_recipe(advice["plans"])
            spent = measured(session.run(every, runs=runs), list(every.arms))
            plain = next(plan for plan, spec in every.arms.items() if not spec.techniques)
            cells.append(
                {"host": host, "data": name, "images": images, **judged(advice, spent, plain)}
            )
            parent = Path(advice["plans"]).parent
            folders += [parent.with_name(f"{parent.name}-{kind}") for kind in ("trials", "plans")]
    result = {
        "rows": [
            {"host": cell["host"], "data": cell["data"], "images": cell["images"], **cell["row"]}
            for cell in cells
        ],
        "cells": cells,
        "served": SERVED,
        "overrides": list(overrides),
        "machine": cpu(),
        "repeatability": _floor.repeatability(),
        "cpu_s": round(sum(r.sum("cpu_s") or 0.0 for r in record.readable(folders))),
    }
    if out is not None:
        _output.write(out, result, _markdown(result))
    return result


def _train_base(ref: str, path: Path, runs: str | Path) -> None:
    if not path.is_file():
        raise BadInput(
            f"the recipe {path} is not there: run this benchmark in a copy of the repository"
        )
    recipe, arm = load_recipe(path), ref.rpartition("/")[2]
    session.run(recipe.model_copy(update={"arms": {arm: recipe.arms[arm]}}), runs=runs)


def measured(folder: Path, plans: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return {"accuracy", "train_energy_j", "serve_energy_j", "total_energy_j", "run_j"} of each
    plan's run below `folder`.

    run_j: of the whole run, with evaluation and measuring. serve_energy_j: of 1,000 images; of
    plans that serve models of the same MACs and parameters the median, since the rest of their
    difference is the machine's.
    """
    spent: dict[str, dict[str, float]] = {}
    alike: dict[tuple[Any, Any], list[float]] = {}
    keys: dict[str, tuple[Any, Any]] = {}
    for plan in plans:
        done = json.loads((folder / plan / "seed0/done.json").read_text())
        trained = next(run for run in record.readable([folder / plan]) if run.id == done["run"])
        keys[plan] = (trained.facts["macs"], trained.facts["params"])
        alike.setdefault(keys[plan], []).append(
            1000 * serving.facts(trained)["inference_energy_j"]["value"]
        )
        training, total = (
            pricing.run_energy(trained, phase).value or 0.0 for phase in ("train", None)
        )
        spent[plan] = {
            "accuracy": trained.facts["accuracy"],
            "train_energy_j": training,
            "run_j": total,
        }
    for plan, figures in spent.items():
        figures["serve_energy_j"] = statistics.median(alike[keys[plan]])
        figures["total_energy_j"] = (
            figures["train_energy_j"] + SERVED / 1000 * figures["serve_energy_j"]
        )
    return spent


def judged(
    advice: Mapping[str, Any], spent: Mapping[str, Mapping[str, float]], plain: str
) -> dict[str, Any]:
    """Return {"row", "plans", "sweep"}: the advice against what was measured, for a target and for
    many.

    spent: as `measured` gives. plain: the plan without techniques; the target is its accuracy less
    `GIVEN_UP`. sweep: the same for each accuracy that any plan reached as the target.
    """
    rows = advice["rows"]
    forecasts = {row["plan"]: row for row in rows}
    target = max(spent[plain]["accuracy"] - GIVEN_UP, 0.01)
    main = regret(rows, spent, target)
    sweep = [
        regret(rows, spent, figures["accuracy"])
        for figures in spent.values()
        if figures["accuracy"] > 0
    ]
    plans = []
    for plan, entry in spent.items():
        if plan in forecasts:  # its trials may have failed where the run did not
            predicted = {"accuracy": forecasts[plan]["metric"]}
            predicted |= {key: forecasts[plan][key] for key in PREDICTED[1:]}
            plans.append(
                {
                    "plan": plan,
                    "predicted": predicted,
                    "measured": dict(entry),
                    "front": forecasts[plan]["front"],
                }
            )
    inside = dict.fromkeys(PREDICTED, 0)
    for entry in plans:
        for key, figure in entry["predicted"].items():
            inside[key] += figure["low"] <= entry["measured"][key] <= figure["high"]
    cost = {plan: figures["total_energy_j"] for plan, figures in spent.items()}
    row = {
        "target": f"{target:.1%}", "pick": main["pick"], "best": main["best"],
        "regret": None if main["regret"] is None else f"{main['regret']:.1%}",
        "missed": None if main["missed"] is None else f"{100 * main['missed']:.1f} points",
        "plain": plain, "plain over best": f"{cost[plain] / cost[main['best']] - 1:.1%}",
        "in range": f"{inside['accuracy']}/{len(plans)}",
        "energy in band": f"{inside['total_energy_j']}/{len(plans)}",
        "trials": si(advice["trials_energy_j"], "J"),
        "all runs": si(sum(figures["run_j"] for figures in spent.values()), "J"),
    }  # fmt: skip
    return {
        "row": row,
        "main": main,
        "plans": plans,
        "refused": dict(advice["refused"]),
        "sweep": sweep,
    }


def regret(
    rows: Sequence[Mapping[str, Any]], spent: Mapping[str, Mapping[str, float]], target: float
) -> dict[str, Any]:
    """Return {"target", "pick", "best", "regret", "missed"}: what advice takes for a target against
    the best there was.

    best: the cheapest plan whose measured accuracy reaches the target. regret: energy of the pick
    over its, less 1; None where the pick misses the target, and then `missed` is by how much.
    """
    pick, _ = choose(rows, target)
    assert pick is not None
    reach = [plan for plan, figures in spent.items() if figures["accuracy"] >= target]
    best = min(reach, key=lambda plan: spent[plan]["total_energy_j"])
    short = target - spent[pick]["accuracy"]
    over = spent[pick]["total_energy_j"] / spent[best]["total_energy_j"] - 1
    return {
        "target": target, "pick": pick, "best": best,
        "regret": over if short <= 0 else None, "missed": short if short > 0 else None,
    }  # fmt: skip


def _markdown(result: Mapping[str, Any]) -> str:
    cells = result["cells"]
    fair = [c for c in cells if c["main"]["regret"] is not None and c["main"]["regret"] <= FAIR]
    sweep = [one for cell in cells for one in cell["sweep"]]
    regrets = sorted(one["regret"] for one in sweep if one["regret"] is not None)
    misses = sorted(one["missed"] for one in sweep if one["missed"] is not None)
    lines = [
        "# Advice: its pick beside the cheapest plan that reached the target", "",
        f"`greenvis bench advise --out reports/advice`, {result['cpu_s']} s of CPU time, "
        f"{', '.join(result['overrides'])}. Advice on {len({c['host'] for c in cells})} hosts and "
        f"{len({c['data'] for c in cells})} data sets; then every plan was trained on all the "
        "images, one seed, and the plan that advice takes was set against the cheapest plan that "
        "really reached the target. Energy is that of training and of serving "
        f"{result['served']:,} images. The target is what plain fine-tuning reached, less "
        f"{100 * GIVEN_UP:g} point.", "",
        f"**The pick is within {FAIR:.0%} of the best in {len(fair)} of {len(cells)} cells.** With "
        "each accuracy that any plan "
        f"reached as the target ({len(sweep)} targets), the pick reached it {len(regrets)} times, "
        f"{sum(r <= FAIR for r in regrets)} of them within {FAIR:.0%} of the best"
        + (f" (median regret {statistics.median(regrets):.1%}, greatest {regrets[-1]:.1%})"
        if regrets else "")
        + (f", and missed it {len(misses)} times, by {100 * statistics.median(misses):.1f} points "
           "in the median and "
           f"{100 * misses[-1]:.1f} at most." if misses else "."), "",
        *_floor.table(result["rows"]),
    ]  # fmt: skip
    if left := [host for host in HOSTS if host not in {c["host"] for c in cells}]:
        lines += ["", f"Not run at full size here yet: {', '.join(left)}."]
    lines += [
        "", "in range: plans whose measured accuracy lies in the predicted range, which is a rule "
            "of thumb (see "
        "`greenvis.planning.extrapolate`); energy in band: of training and serving. trials: what "
        "the advice cost; all runs: what "
        "running every plan cost. Energy as `greenvis doctor` says. "
        + _floor.sentence(None, repeatability=result.get("repeatability")), "", *_why(cells),
    ]  # fmt: skip
    for cell in cells:
        lines += ["", f"## {cell['host']}, {cell['data']}", "", *_plans(cell)]
    return "\n".join(lines) + "\n"


def _why(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line per cell whose pick is not within `FAIR` of the best: predicted and measured
    figures of the two."""
    lines = []
    for cell in cells:
        main, by = cell["main"], {p["plan"]: p for p in cell["plans"]}
        if main["regret"] is not None and main["regret"] <= FAIR:
            continue
        how = (
            f"{main['regret']:.1%} over the best"
            if main["missed"] is None
            else f"{100 * main['missed']:.1f} points short"
        )
        texts = "; ".join(_outcome(by[plan]) for plan in (main["pick"], main["best"]) if plan in by)
        lines.append(f"- {cell['host']}, {cell['data']}: the pick is {how}. {texts}.")
    return ["Where it is not, and why:", "", *lines] if lines else []


def _outcome(plan: Mapping[str, Any]) -> str:
    predicted, actual = (
        (figures["accuracy"], figures["total_energy_j"])
        for figures in (plan["predicted"], plan["measured"])
    )
    return (
        f"{plan['plan']} was predicted {predicted[0]['value']:.1%} for "
        f"{si(predicted[1]['value'], 'J')} and reached {actual[0]:.1%} for {si(actual[1], 'J')}"
    )


def _plans(cell: Mapping[str, Any]) -> list[str]:
    heads = ["plan", "accuracy, predicted", "measured"]
    heads += [
        word
        for what in ("training", "1,000 images", "total")
        for word in (f"{what}, predicted", "measured")
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for entry in sorted(cell["plans"], key=lambda p: p["measured"]["total_energy_j"]):
        predicted, actual = entry["predicted"], entry["measured"]
        accuracy = predicted["accuracy"]
        shown = [
            f"{accuracy['value']:.1%} ({100 * accuracy['low']:.0f}–{100 * accuracy['high']:.0f})",
            f"{actual['accuracy']:.1%}",
        ]
        for key in ("train_energy_j", "serve_energy_j", "total_energy_j"):
            shown += [si(predicted[key]["value"], "J"), si(actual[key], "J")]
        lines.append(
            f"| {entry['plan']}{' (front)' if entry['front'] else ''} | {' | '.join(shown)} |"
        )
    return [*lines, "", *(f"- left out: {plan}: {why}" for plan, why in cell["refused"].items())]
