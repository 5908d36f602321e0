"""Seed runs to the results of a report: one plain dict, the same for the same records wherever they
lie.

results.json, schema 2 (units stand in the keys; null is "not known", never 0):

    name, title, note, baseline, metric, lower_is_better, order     what is compared, and the order
    of the arms margin, comparisons                                how much of the metric may be
    lost (points of a share); arms compared served
    images at which the full cycle is added up arms.ARM   means over finished seeds:
      METRIC             {mean, std, n, by_seed}, the gain ("accuracy" by default, a share of 1)
      train_energy_j     {value, low, high, provenance, method, std, n, by_seed}: all that led to
      the result but measurement
      train_energy_with_reuse_j                          likewise, with all it builds on whose cost
      is known: the whole line total_energy_j, carbon_g, total_carbon_g           likewise; carbon_g
      is of train_energy_j energy_by_phase_j, energy_by_component_j           parts of
      total_energy_j inference_energy_j {value, …, reason}              of one image
      predicted.QUANTITY {value, low, high, actual, ratio, inside, n}: where a plan was made:
      energy_j, carbon_g, wall_s, flops macs, params, trainable_params, delta_bytes, train_flops,
      latency_ms {p50, p95}, images_per_s, peak_memory_mb, wall_s operating_points [{setting,
                         accuracy, inference_energy_j, energy_ratio, macs, macs_ratio, realised,
                         exits, energy_spread}] of a model that can be switched after training;
                         ratios to the setting "never"
      embodied_g, sci {e_kwh, i_g_per_kwh, m_g, g_per_image}, full_cycle {make_j, serve_j,
      total_whole_j, …} uses [{role, name, runs, of, energy_j, used_by_runs}]  what it builds on;
      energy_j.value is null where nobody knows base_reuse {whole_j, whole_g, shared_j, shared_g}
      its cost, charged whole and shared among the runs here std {wall_s, latency_p50_ms,
      images_per_s, peak_memory_mb}: standard deviation over seeds spent {energy_j, carbon_g,
      unfinished_energy_j, repeated_energy_j, older_inputs_energy_j}: sums, nothing left out by_seed
      {QUANTITY: {seed: value}} of what is compared and has no values by seed above vs_baseline
                         by quantity {ratio, low, high, n}, paired by seed; METRIC {mean, low, high,
                         n, verdict, more_seeds}: the difference, and whether the arm keeps the
                         metric (`stats.decide`). low, high: an interval that holds together with
                         those of all `comparisons` arms with 95 % (`stats.interval`), null for one
                         seed; payback {own, with_reuse}: {verdict, images, low, high, seeds_agree};
                         verdict is "at once", "pays back", "ahead until", "never", or "not shown"
                         where one image costs the same for all we know
      energy_to_baseline_j, curve {seed: [[joules, METRIC], …]}, status, seeds, attempts, zones,
      assumed_grid
    noise_floor {training, serving}                      {ratio, arms}: how far arms that did the
    same work read apart totals, incomplete                                   everything these
      records burnt, once; seed runs that never finished totals.startup_j of that, what `starts`
      processes took to start: in no arm totals.overlapping {starts, seen_j,
                         counted_j}     starts that ran beside others on one counter, or in one
                         process: what they read together, and what of that is counted; arms have
                         equal shares of what several saw
    family {members {NAME: {own_j, line_j}}, links [{of, on, role}]}, null where nothing builds on
    anything environment, recipe, command, git, data, models, sources, carbon_intensity, pue,
    crosscheck, not_counted, notes, …
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from greenvis.core import yamlfile
from greenvis.errors import BadInput, nearest
from greenvis.report import arms as arms_
from greenvis.report import comparison, family, forecast, formatting, provenance, reuse, settings
from greenvis.report.arms import Arm
from greenvis.report.groups import SeedRun

SCHEMA = 2
MARGIN = 0.5  # points of a share of 1 that may be lost, unless told
RESERVED = (
    *arms_.PLAIN,
    "status",
    "seeds",
    "attempts",
    "uses",
    "spent",
    "latency_ms",
    "wall_s",
    "train_flops",
)


def results(
    groups: list[SeedRun],
    notes: list[str],
    *,
    baseline: str | None = None,
    metric: str = "accuracy",
    grid: Mapping[str, Any] | None = None,
    served: float = 1_000_000,
    margin: float | None = None,
) -> dict[str, Any]:
    """Return the results: {"schema", "name", "baseline", "metric", "arms", "totals", "environment",
    …}.

    grid: a carbon intensity that replaces the recorded ones; it changes grams and nothing else.
    served: images a model answers in its life, for the full cycle. margin: how much of the metric
    may be lost: points of a share of 1 (0.5 unless the recipe says otherwise), the metric's own
    unit else (0 unless told). Raises BadInput for an unknown baseline or a metric that names
    something else.
    """
    if metric in RESERVED or metric.endswith(("_j", "_g")):
        raise BadInput(
            f"metric '{metric}' is a cost the report shows anyway; name what is gained, such as "
            "'accuracy'"
        )
    arms = to_arms(groups)
    base = _baseline(baseline, arms)
    last = {a.label: next((r.done for r in a.done.values()), None) for a in arms}
    users = reuse.users(r for a in arms for r in a.done.values())
    table = {a.label: _row(a, metric, grid, users) for a in arms}
    if all(t[metric]["n"] == 0 for t in table.values()) and any(a.done for a in arms):
        _unknown_metric(metric, arms)
    comparison.reach(table, {a.label: a for a in arms}, base, metric)
    for arm in arms:
        table[arm.label]["curve"] = {
            str(s): [list(p) for p in comparison.thin(comparison.curve(r))]
            for s, r in arm.done.items()
        }
        table[arm.label]["sci"] = comparison.sci(table[arm.label], last[arm.label])
    names, stated = sorted({g.name for g in groups}), _stated(arms)
    content = {
        "schema": SCHEMA,
        "name": names[0]
        if len(names) == 1
        else " + ".join(names[:3]) + (f" + {len(names) - 3} more" if len(names) > 3 else ""),
        "title": stated.get("title"),
        "note": stated.get("note"),
        "baseline": base,
        "metric": metric,
        "margin": _margin(stated, metric) if margin is None else margin,
        "comparisons": 0,
        "noise_floor": None,
        "served": served,
        "lower_is_better": comparison.lower_is_better(metric),
        "arms": table,
        "order": _order(arms, base),
        "totals": _totals(arms, grid),
        "incomplete": _incomplete(arms),
        "family": family.family(arms),
        **provenance.describe(arms, grid, notes),
    }
    comparison.compare(content)
    return content


def _row(
    arm: Arm, metric: str, grid: Mapping[str, Any] | None, users: Mapping[str, int]
) -> dict[str, Any]:
    done = list(arm.done.values())
    row = arms_.numbers(arm, metric, grid) | reuse.reuse(done, users, grid)
    # the same in two arms: the same work
    row |= {"inputs": None if arm.runs[0].tracked else arm.runs[0].inputs or None}
    row |= {"network": _network(row, done)}
    planned, switched = forecast.predicted(done, grid), settings.settings(arm)
    return (
        row
        | ({"predicted": planned} if planned else {})
        | ({"operating_points": switched} if switched else {})
    )


def _network(row: Mapping[str, Any], done: list[SeedRun]) -> list[Any] | None:
    """Return what is the same in two arms whose finished networks are; None where the records do
    not say."""
    model = next((r.done.facts.get("model") for r in done if r.done), None)
    return (
        [model.get("ref"), model.get("options"), row["macs"], row["params"]]
        if isinstance(model, Mapping)
        else None
    )


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
        others = [
            (r.seed, max(a.number for a in r.attempts)) for r in runs if r.inputs == newest.inputs
        ]
        last = dict(others)
        own = [(r.seed, max(a.number for a in r.attempts)) for r in runs if r.inputs == run.inputs]
        common = [number - last[seed] for seed, number in own if seed in last]
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
        (x.start_s, str(x.header.get("baseline"))) for a in arms for r in a.runs for x in r.attempts
    )
    return next((b for b in (*(n for _, n in reversed(named)), "baseline") if b in labels), None)


def _stated(arms: list[Arm]) -> dict[str, Any]:
    """What the newest recipe in the records says under `report`: title, note, margin; {} where none
    is recorded."""
    recipes = [
        (a.start_s, a.header.get("recipe")) for arm in arms for r in arm.runs for a in r.attempts
    ]
    texts = [(at, text) for at, text in recipes if isinstance(text, str)]
    try:
        recipe = yamlfile.parse(max(texts)[1], "its recipe") if texts else None
    except BadInput:  # a header of other hands
        recipe = None
    section = recipe.get("report") if isinstance(recipe, dict) else None
    section = section if isinstance(section, dict) else {}
    return {k: v for k, v in section.items() if k == "margin" or isinstance(v, str)}


def _margin(stated: Mapping[str, Any], metric: str) -> float:
    """The margin the recipe states, else half a point of a share of 1, and nothing of what has
    other units."""
    margin = stated.get("margin")
    return (
        float(margin)
        if isinstance(margin, (int, float)) and margin >= 0
        else MARGIN
        if formatting.share(metric)
        else 0.0
    )


def _unknown_metric(metric: str, arms: list[Arm]) -> None:
    facts = {
        k
        for a in arms
        for r in a.done.values()
        for k, v in (r.done.facts if r.done else {}).items()
        if isinstance(v, (int, float)) and k not in RESERVED
    }
    # a tracked run need not have an accuracy; another metric was asked for on purpose
    if metric != "accuracy":
        raise BadInput(
            f"no finished run has a fact or a log named '{metric}'{nearest(metric, facts)}"
        )


def _order(arms: list[Arm], base: str | None) -> list[str]:
    """The order of tables and figures: the baseline, then the arms as they were first started."""
    first = {a.label: min(x.start_s for r in a.runs for x in r.attempts) for a in arms}
    return sorted(first, key=lambda label: (label != base, first[label], label))


def _totals(arms: list[Arm], grid: Mapping[str, Any] | None) -> dict[str, Any]:
    """Everything these records burnt, whatever became of it."""
    every = [a for arm in arms for r in arm.all for a in r.attempts]
    attempts, overlapping = (
        [a for a in every if not a.inside],
        [a for a in every if a.seen_j.value is not None],
    )
    return {
        "nested_runs": len(every) - len(attempts),
        "energy_j": arms_.sum_reading(a.own_j for a in attempts),
        "carbon_g": arms_.sum_reading(arms_.attempt_grams(a, a.own_j, grid) for a in attempts),
        "unfinished_energy_j": arms_.sum_reading(a.own_j for a in attempts if a.status != "done"),
        "startup_j": arms_.sum_reading(a.startup_j for a in every if a.startup_j.value is not None),
        "starts": sum(a.startup_j.value is not None for a in every),
        "overlapping": {
            "starts": len(overlapping),
            "seen_j": arms_.sum_reading(a.seen_j for a in overlapping),
            "counted_j": arms_.sum_reading(a.own_j for a in overlapping),
        },
        "runs": sum(len(arm.all) for arm in arms),
        "attempts": dict(sorted(Counter(a.status for a in attempts).items())),
    }


def _incomplete(arms: list[Arm]) -> list[dict[str, Any]]:
    """Seed runs without a finished attempt, and what they burnt."""
    return [
        {
            "arm": arm.label, "seed": run.seed, "attempts": [a.status for a in run.attempts],
            "reason": next((a.reason for a in reversed(run.attempts) if a.reason), ""),
            "energy_j": arms_.sum_reading(a.total_energy_j for a in run.attempts),
        }
        for arm in arms for run in arm.all if not run.done
    ]  # fmt: skip
