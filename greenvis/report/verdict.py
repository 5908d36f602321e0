"""The sentence on top of a report: what was gained, what it cost, how sure that is."""

from __future__ import annotations

from typing import Any

from greenvis.report import words


def headline(found: dict[str, Any]) -> str:
    """Return the arm the verdict is about: of those not shown worse than the baseline, the one of least energy;
    if all are shown worse, the best of them. The baseline itself, or the best arm, where there is nothing to compare.
    """
    arms, base, metric = found["arms"], found["baseline"], found["metric"]
    sign = -1 if found["lower_is_better"] else 1
    rivals = [a for a in found["order"] if arms[a]["vs_baseline"]]
    if not rivals:
        scored = [a for a in found["order"] if arms[a][metric]["mean"] is not None]
        best = max(scored, key=lambda a: sign * arms[a][metric]["mean"]) if scored else found["order"][0]
        return base if base in scored and base is not None else best

    def worse(a: str) -> bool:
        d = arms[a]["vs_baseline"][metric]
        return bool(d) and sign * d["mean"] < 0 and (words.shown(d) or d["n"] == 1 or d["p_value"] is None)

    def cost(a: str) -> float:
        joules = arms[a]["train_energy_j"]["value"]
        return float("inf") if joules is None else joules

    kept = [a for a in rivals if not worse(a)]
    if kept:
        return min(kept, key=cost)
    return max(rivals, key=lambda a: sign * (arms[a][metric]["mean"] if arms[a][metric]["mean"] is not None else float("-inf")))


def sentence(found: dict[str, Any], label: str) -> str:
    """Return what the records show of one arm, beside the baseline where there is one."""
    row, base, metric = found["arms"][label], found["baseline"], found["metric"]
    if row["status"] == "incomplete":
        return f"{label} has no finished run; {words.si(row['spent']['energy_j']['value'], 'J')} were spent on it."
    scored = row[metric]["mean"] is not None
    reached = f"{label} reached {words.spread(metric, row[metric])}" if scored else f"{label} (no {metric} recorded)"
    if scored and metric != "accuracy":
        reached += f" {metric}"
    vs = row["vs_baseline"]
    if not vs:
        spent = row["train_energy_j"]
        cost = f" for {words.si(spent['value'], 'J')} of training energy" if spent["value"] is not None else ""
        return reached + cost + _one_seed(row) + "."
    return f"{reached} with {_energy(vs, base)}; {_gain(found, label)}.{_reuse(vs)}{_partly(row)}"


def _energy(vs: dict[str, Any], base: str | None) -> str:
    r = vs["train_energy"]
    if not r:
        return f"an unknown share of the training energy of {base}"
    if r["n"] > 1 and r["p_value"] is not None and not words.shown(r):
        return f"no difference shown in training energy to {base} ({words.times(r)})"
    return f"{words.times(r, 'training energy')} {'as' if abs(r['ratio'] - 1) < 0.005 else 'than'} {base}"


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


def _reuse(vs: dict[str, Any]) -> str:
    """Say what the ratio becomes with the teacher or base charged whole, where that differs."""
    own, whole = vs["train_energy"], vs["train_energy_with_reuse"]
    if not own or not whole or abs(own["ratio"] - whole["ratio"]) < 1e-9:
        return ""
    return f" With the reused training (teacher, base) charged in full: {words.times(whole, 'energy')}."


def _one_seed(row: dict[str, Any]) -> str:
    return " (one seed: no spread is known)" if len(row["seeds"]) == 1 else ""


def _partly(row: dict[str, Any]) -> str:
    return " Not every seed finished." if row["status"] == "partly done" else ""
