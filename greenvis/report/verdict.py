"""The sentence on top of a report: what was gained, what it cost, how sure that is."""

from __future__ import annotations

from typing import Any

from greenvis.report import continual, words

SURE_WITHOUT_A_TEST = 0.95  # with one seed no test is possible: a ratio below this is taken as cheaper


def headline(found: dict[str, Any]) -> str:
    """Return the arm the verdict is about. The baseline, or the best arm, where there is nothing to compare."""
    return _choice(found)[0]


def opening(found: dict[str, Any]) -> str:
    """Return the verdict: what no arm achieved, if so, and the sentence on the arm that came nearest."""
    label, lacking = _choice(found)
    return lacking + sentence(found, label)


def _choice(found: dict[str, Any]) -> tuple[str, str]:
    """Return the arm of the verdict, and what to say first where no arm saved energy and kept the gain.

    In order: the cheapest of the arms that cost less and lose nothing; the best that gains; of those that cost less and lose,
    the one that loses least; else the best. "Loses nothing": no worse than seeds scatter, and its own 95 % interval reaches
    no loss (not adjusted for the number of arms: that would let more of them pass). An arm that trained on all tasks of a
    stream at once is a bound: it is named where there is no other.
    """
    arms, base, metric = found["arms"], found["baseline"], found["metric"]
    sign = -1 if found["lower_is_better"] else 1
    compared = [a for a in found["order"] if arms[a]["vs_baseline"]]
    rivals = [a for a in compared if not continual.all_at_once(arms[a])] or compared

    def gain(a: str) -> float:
        return sign * arms[a][metric]["mean"] if arms[a][metric]["mean"] is not None else float("-inf")

    if not rivals:
        scored = [a for a in found["order"] if arms[a][metric]["mean"] is not None]
        best = max(scored, key=gain) if scored else found["order"][0]
        return (base if base in scored and base is not None else best), ""
    cheap = [a for a in rivals if _cheaper(arms[a]["vs_baseline"][_cost(found, a)])]
    kept = [a for a in cheap if _keeps(found, a, sign)]
    if kept:
        return min(kept, key=lambda a: arms[a]["vs_baseline"][_cost(found, a)]["ratio"]), ""
    better = [a for a in rivals if (d := arms[a]["vs_baseline"][metric]) and sign * d["mean"] > 0 and words.shown(d)]
    if better:
        return max(better, key=gain), f"No arm is shown to cost less than {base} and keep its {metric}. "
    if cheap:
        return max(cheap, key=gain), f"No arm is shown to cost less than {base} and keep its {metric}. "
    return max(rivals, key=gain), f"No arm is shown to cost less than {base}, or to be better. "


def _cost(found: dict[str, Any], label: str) -> str:
    """Return which energy an arm is judged by: that of one image where it goes on from the baseline's own trained model."""
    whole = f"{found['name']}/{found['baseline']}"
    return "inference_energy" if any(u["name"] == whole for u in found["arms"][label]["uses"]) else "train_energy"


def _cheaper(r: dict[str, Any] | None) -> bool:
    """Whether less energy than the baseline's is shown, or, where no test is possible, plain."""
    return bool(r) and (r["ratio"] < 1 and words.shown(r) if r["n"] > 1 else r["ratio"] < SURE_WITHOUT_A_TEST)


def _keeps(found: dict[str, Any], label: str, sign: int) -> bool:
    arms, metric = found["arms"], found["metric"]
    d = arms[label]["vs_baseline"][metric]
    if not d:  # nothing to lose was recorded
        return all(row[metric]["mean"] is None for row in arms.values())
    scatter = sum(arms[a][metric]["std"] or 0.0 for a in (label, found["baseline"]))
    best = d["high"] if sign > 0 else d["low"]
    return sign * d["mean"] >= -scatter and (best is None or sign * best >= 0)


def sentence(found: dict[str, Any], label: str) -> str:
    """Return what the records show of one arm, beside the baseline where there is one."""
    row, base, metric = found["arms"][label], found["baseline"], found["metric"]
    if row["status"] == "incomplete":
        tried = ", ".join(f"{n} {status}" if n > 1 else status for status, n in row["attempts"].items())
        return f"{label} has no finished run ({tried}); {words.si(row['spent']['energy_j']['value'], 'J')} were spent on it."
    scored = row[metric]["mean"] is not None
    bound = ", trained on all tasks at once as no stream allows," if continual.all_at_once(row) else ""
    reached = f"{label}{bound} reached {words.spread(metric, row[metric])}" if scored else f"{label} (no {metric} recorded)"
    if scored and metric != "accuracy":
        reached += f" {metric}"
    vs = row["vs_baseline"]
    if not vs:
        spent = row["train_energy_j"]
        joules = f"{words.si(spent['value'], 'J')} of training energy" if spent["value"] is not None else ""
        if not scored:
            return f"{label} took {joules or 'an unknown energy'}; no {metric} was recorded{_one_seed(row)}."
        cost = f" for {joules}" if joules else ""
        return reached + cost + _one_seed(row) + "."
    key = _cost(found, label)
    goes_on = f", going on from {base}," if key == "inference_energy" else ""
    return f"{reached}{goes_on} with {_energy(vs[key], base, key)}; {_gain(found, label)}.{reused(found, label)}{_partly(row)}"


def _energy(r: dict[str, Any] | None, base: str | None, key: str) -> str:
    what = {"train_energy": "training energy", "inference_energy": "energy an image"}[key]
    if not r:
        return f"an unknown share of the {what} of {base}"
    if r["n"] > 1 and r["p_value"] is not None and not words.shown(r):
        return f"no difference shown in {what} to {base}: {words.times(r)}"
    return f"{words.times(r, what)} {'as' if abs(r['ratio'] - 1) < 0.005 else 'than'} {base}"


def _gain(found: dict[str, Any], label: str) -> str:
    metric = found["metric"]
    d = found["arms"][label]["vs_baseline"][metric]
    if not d:
        return f"no {metric} to compare"
    text = f"{metric} {words.points(metric, d['mean'])}"
    if d["low"] is not None and d["n"] > 1:
        ends = [words.points(metric, d[k]).removesuffix(" points") for k in ("low", "high")]
        text += f" (95\u00a0% interval {ends[0]} to {ends[1]})"
    return f"{text}: {words.significance(d)}"


def reused(found: dict[str, Any], label: str) -> str:
    """Say what the ratio becomes with the training it builds on charged whole, where that differs."""
    vs = found["arms"][label]["vs_baseline"]
    own, whole = vs["train_energy"], vs["train_energy_with_reuse"]
    if not own or not whole or abs(own["ratio"] - whole["ratio"]) < 1e-9:
        return ""
    return f" Charging {builds_on(found, label)} as well: {words.times(whole, 'energy')}."


def builds_on(found: dict[str, Any], label: str) -> str:
    """Return what is charged in a comparison of an arm to the baseline: "the base of full and lora"."""
    owners = [a for a in (found["baseline"], label) if found["arms"][a]["uses"]]
    roles = dict.fromkeys(u["role"] for a in owners for u in found["arms"][a]["uses"])
    return f"the {' and '.join(roles)} of {' and '.join(owners)}"


def _one_seed(row: dict[str, Any]) -> str:
    return " (one seed: no spread is known)" if len(row["seeds"]) == 1 else ""


def _partly(row: dict[str, Any]) -> str:
    return " Not every seed finished." if row["status"] == "partly done" else ""
