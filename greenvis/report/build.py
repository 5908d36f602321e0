"""Seed runs to the results of a report (`greenvis.report.shape.Results`), the same for the same
records wherever they lie."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.core import yamlfile
from greenvis.errors import BadInput, nearest
from greenvis.meters import labels
from greenvis.report import arms as arms_
from greenvis.report import comparison, family, provenance, reuse, stats
from greenvis.report.arm_results import ArmResults
from greenvis.report.groups import Loaded
from greenvis.report.measures import DEFAULT, is_share
from greenvis.report.runs import Arm, SeedRun
from greenvis.report.shape import SCHEMA, Overlapping, Results, Totals, Unfinished
from greenvis.report.sums import sum_reading
from greenvis.tasks.base import Measure

MARGIN = 0.5  # points of a share of 1 that may be lost, unless told


def results(
    loaded: Loaded,
    *,
    baseline: str | None = None,
    grid: Mapping[str, Any] | None = None,
    served: int = 1_000_000,
    margin: float | None = None,
    label_seconds: Iterable[str] = (),
) -> Results:
    """Return the results of seed runs.

    Args:
        loaded: of `groups.load`.
        baseline: the arm others are compared with.
        grid: a carbon intensity that replaces the recorded ones; it changes grams and nothing else.
        served: images a model answers in its life, for the full cycle.
        margin: how much of the metric may be lost: points of a share of 1 (0.5 unless the recipe
            says otherwise), the metric's own unit else (0 unless told).
        label_seconds: of `meters.labels.seconds`.

    Raises:
        BadInput: for an unknown baseline or a metric that names something else.
    """
    groups, measure = loaded.groups, loaded.measure
    metric = measure.name
    if metric in ArmResults.model_fields or metric.endswith(("_j", "_g")):
        raise BadInput(
            f"metric '{metric}' is a cost the report shows anyway; name what is gained, such as "
            "'accuracy'"
        )
    arms = to_arms(groups)
    base = _baseline(baseline, arms)
    rows = _rows(arms, base, measure, grid)
    if all(row.gain.n == 0 for row in rows.values()) and any(a.done for a in arms):
        _unknown_metric(metric, arms)
    stated = _stated(arms)
    content = {
        "schema": SCHEMA,
        "name": _name(groups),
        "title": stated.get("title"),
        "note": stated.get("note"),
        "baseline": base,
        "arm": stated.get("arm") if stated.get("arm") in rows else None,
        "metric": metric,
        **_of_task(loaded, arms),
        "margin": _margin(stated, measure) if margin is None else margin,
        "comparisons": 0,
        "noise_floor": None,
        "served": served,
        "lower_is_better": not measure.higher_is_better,
        "arms": rows,
        "order": _order(arms, base),
        "totals": _totals(arms, grid),
        "incomplete": _incomplete(arms),
        "family": family.family(arms),
    }
    content["label_seconds"] = priced_labels(rows, label_seconds)
    where = provenance.describe(arms, grid, loaded.notes)
    known = {name: getattr(where, name) for name in where.model_fields_set}
    return comparison.compared(Results.model_validate({**content, **known}))


def priced_labels(
    rows: Mapping[str, ArmResults], asked: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the seconds of the kinds of labels that arms used. Raises BadInput for bad seconds."""
    kinds = {part.kind for row in rows.values() for part in row.labels}
    return {kind: s for kind, s in labels.seconds(asked).items() if kind in kinds}


def _rows(
    arms: list[Arm], base: str | None, measure: Measure, grid: Mapping[str, Any] | None
) -> dict[str, ArmResults]:
    users = reuse.users(r for a in arms for r in a.done.values())
    metric, lower = measure.name, not measure.higher_is_better
    scores = [r.metric(metric) for a in arms if a.label == base for r in a.finished.values()]
    target = stats.summary(dict(enumerate(s for s in scores if s is not None))).mean
    return {a.label: arms_.results(a, metric, grid, users, target, lower) for a in arms}


def _name(groups: list[SeedRun]) -> str:
    names = sorted({g.name for g in groups})
    more = f" + {len(names) - 3} more" if len(names) > 3 else ""
    return " + ".join(names[:3]) + more


def to_arms(groups: list[SeedRun]) -> list[Arm]:
    """Group seed runs into arms. A recipe's arm keeps its newest inputs; a tracked run is an arm of
    its own."""
    kinds: dict[tuple[str, str], list[SeedRun]] = defaultdict(list)
    tracked: dict[str, list[SeedRun]] = defaultdict(list)
    for g in groups:
        (tracked[g.name] if g.tracked else kinds[g.name, g.arm]).append(g)
    arms: list[Arm] = []
    names = Counter(arm for _, arm in kinds)
    for (name, arm), runs in sorted(kinds.items()):
        newest = _newest(runs)
        label = arm if names[arm] == 1 else f"{name}/{arm}"
        arms.append(
            Arm(
                label,
                [r for r in runs if r.inputs == newest],
                [r for r in runs if r.inputs != newest],
            )
        )
    taken = {a.label for a in arms}
    for name, runs in sorted(tracked.items()):
        for run in sorted(runs, key=lambda r: (r.newest_s, r.inputs)):
            label, k = name, 1
            while label in taken:
                k += 1
                label = f"{name} ({k})"
            taken.add(label)
            arms.append(Arm(label, [run]))
    return arms


def _newest(runs: list[SeedRun]) -> str:
    """Return the inputs that an arm was last run with: by attempts at the same seed, which count
    on, else by the clock.

    A clock may have been set back; the numbers of attempts only grow, but each seed has its own.
    """
    newest = runs[0]
    for run in runs[1:]:
        last = {r.seed: r.last_number for r in runs if r.inputs == newest.inputs}
        own = {r.seed: r.last_number for r in runs if r.inputs == run.inputs}
        common = [number - last[seed] for seed, number in own.items() if seed in last]
        later = (
            sum(common) > 0
            if any(common)
            else (run.newest_s, run.inputs) > (newest.newest_s, newest.inputs)
        )
        newest = run if later and run.inputs != newest.inputs else newest
    return newest.inputs


def _baseline(asked: str | None, arms: list[Arm]) -> str | None:
    """The baseline asked for, else the one the newest records name, else an arm called "baseline",
    else none."""
    labels = [a.label for a in arms]
    if asked is not None:
        if asked not in labels:
            raise BadInput(f"no arm '{asked}' to be the baseline{nearest(asked, labels)}")
        return asked
    named = sorted(
        (x.setup.start_s, str(x.setup.baseline)) for a in arms for r in a.runs for x in r.attempts
    )
    return next((b for b in (*(n for _, n in reversed(named)), "baseline") if b in labels), None)


def _stated(arms: list[Arm]) -> dict[str, Any]:
    """What the newest recipe in the records says under `report`: title, note, arm, margin; {} where
    none is recorded."""
    recipes = [
        (a.setup.start_s, a.setup.recipe) for arm in arms for r in arm.runs for a in r.attempts
    ]
    texts = [(at, text) for at, text in recipes if isinstance(text, str)]
    try:
        recipe = yamlfile.parse(max(texts)[1], "its recipe") if texts else None
    except BadInput:  # a header of other hands
        recipe = None
    section = recipe.get("report") if isinstance(recipe, dict) else None
    section = section if isinstance(section, dict) else {}
    return {k: v for k, v in section.items() if k == "margin" or isinstance(v, str)}


def _of_task(loaded: Loaded, arms: list[Arm]) -> dict[str, str]:
    """Return the unit of the metric, where the records state it, the task, where that is another
    than classification, and what is served, where that is no image."""
    facts = [run.facts for a in arms for run in a.finished.values()]
    tasks, units = {f.task for f in facts}, {f.unit for f in facts}
    task = tasks.pop() if len(tasks) == 1 else ""
    unit = units.pop() if len(units) == 1 else "image"
    stated = any(loaded.measure in f.measures for f in facts)
    return (
        ({"metric_unit": loaded.measure.unit} if stated else {})
        | ({"task": task} if task not in ("", "classification") else {})
        | ({"unit": unit} if unit != "image" else {})
    )


def _margin(stated: Mapping[str, Any], measure: Measure) -> float:
    """The margin the recipe states, else half a point of a share of 1, and nothing of what has
    other units."""
    margin = stated.get("margin")
    return (
        float(margin)
        if isinstance(margin, (int, float)) and margin >= 0
        else MARGIN
        if is_share(measure)
        else 0.0
    )


def _unknown_metric(metric: str, arms: list[Arm]) -> None:
    facts = {k for a in arms for run in a.finished.values() for k in run.facts.numbers}
    facts -= {*ArmResults.model_fields}
    # a tracked run need not have an accuracy; another metric was asked for on purpose
    if metric != DEFAULT:
        raise BadInput(
            f"no finished run has a fact or a log named '{metric}'{nearest(metric, facts)}"
        )


def _order(arms: list[Arm], base: str | None) -> list[str]:
    """The order of tables and figures: the baseline, then the arms as they were first started."""
    first = {a.label: min(x.setup.start_s for r in a.runs for x in r.attempts) for a in arms}
    return sorted(first, key=lambda label: (label != base, first[label], label))


def _totals(arms: list[Arm], grid: Mapping[str, Any] | None) -> Totals:
    """Everything these records burnt, whatever became of it."""
    every = [a for arm in arms for r in arm.all for a in r.attempts]
    attempts = [a for a in every if not a.inside]
    overlapping = [a for a in every if a.seen_j.value is not None]
    startups = [a.startup_j for a in every if a.startup_j.value is not None]
    return Totals(
        nested_runs=len(every) - len(attempts),
        energy_j=sum_reading(a.own_j for a in attempts),
        carbon_g=sum_reading(a.grams(a.own_j, grid) for a in attempts),
        unfinished_energy_j=sum_reading(a.own_j for a in attempts if a.status != "done"),
        startup_j=sum_reading(startups),
        starts=len(startups),
        overlapping=Overlapping(
            starts=len(overlapping),
            seen_j=sum_reading(a.seen_j for a in overlapping),
            counted_j=sum_reading(a.own_j for a in overlapping),
        ),
        runs=sum(len(arm.all) for arm in arms),
        attempts=dict(sorted(Counter(a.status for a in attempts).items())),
    )


def _incomplete(arms: list[Arm]) -> list[Unfinished]:
    """Seed runs without a finished attempt, and what they burnt."""
    return [
        Unfinished(
            arm=arm.label,
            seed=run.seed,
            attempts=[a.status for a in run.attempts],
            reason=next((a.reason for a in reversed(run.attempts) if a.reason), ""),
            energy_j=sum_reading(a.total_energy_j for a in run.attempts),
        )
        for arm in arms
        for run in arm.all
        if not run.done
    ]
