"""The sentence on top of a report: what was gained, what it cost with all it builds on, how sure
that is."""

from __future__ import annotations

from dataclasses import dataclass, field

from greenvis.report import formatting, frontier, measures
from greenvis.report.arm_results import ArmResults
from greenvis.report.frontier import Distance
from greenvis.report.shape import Results


@dataclass(frozen=True)
class Choice:
    """What the verdict is about.

    Attributes:
        arm: The arm it names.
        why: "saves" energy against the frontier of plain training at the same metric, "keeps" the
            metric for less energy than the baseline, is "better", is "cheaper", or "none" of these
            is shown; "alone" where it is compared with nothing.
        distance: Of its whole line to the frontier, where that was read.
    """

    arm: str
    why: str
    distance: Distance = field(default_factory=Distance)


def headline(results: Results) -> str:
    """Return the arm the verdict is about. The baseline, or the best arm, where there is nothing to
    compare."""
    return choice(results).arm


def choice(results: Results) -> Choice:
    """Choose the arm of the verdict.

    The arm that the recipe asks about; else, in order: the arm that keeps the metric and saves
    most against the frontier of plain training; the cheapest of those that keep the metric, cost
    less than the baseline and are not inside that frontier; whichever saves against the frontier,
    then whichever keeps; the best that gains; of those that cost less the one that loses least;
    else the best. All by the intervals shown. An arm that trained on all tasks of a stream at once
    is a bound: it is named where there is no other.
    """
    arms, base = results.arms, results.baseline
    sign = -1 if results.lower_is_better else 1
    compared = [a for a in results.order if arms[a].vs_baseline]
    rivals = [a for a in compared if not _is_bound(arms[a])] or compared
    rivals = [results.arm] if results.arm in compared else rivals

    def gain(a: str) -> float:
        mean = arms[a].gain.mean
        return float("-inf") if mean is None else sign * mean

    if not rivals:
        scored = [a for a in results.order if arms[a].gain.mean is not None]
        best = max(scored, key=gain) if scored else results.order[0]
        return Choice(base if base in scored and base is not None else best, "alone")
    far = frontier.of_all(results)
    saves = {a: r.ratio for a in rivals if a in far and far[a].saves and (r := far[a].ratio)}
    ratios = {a: arms[a].ratio(cost(results, a)) for a in rivals}
    cheap = {a: r.ratio for a, r in ratios.items() if r and r.ratio < 1 and formatting.shown(r)}
    keep = {a: ratio for a, ratio in cheap.items() if keeps(results, a)}
    beyond = {a: ratio for a, ratio in keep.items() if not (a in far and far[a].inside)}
    both = {a: ratio for a, ratio in saves.items() if keeps(results, a)}
    order = (("saves", both), ("keeps", beyond), ("saves", saves), ("keeps", keep))
    for why, those in order:
        if those:
            arm = min(those, key=lambda a: those[a])
            return Choice(arm, why, far.get(arm, Distance()))
    better = [a for a in rivals if is_better(results, a)]
    arm = max(better or cheap or rivals, key=gain)
    why = "better" if better else "cheaper" if cheap else "none"
    return Choice(arm, why, far.get(arm, Distance()))


def is_better(results: Results, label: str) -> bool:
    """Whether an arm's interval shows that its metric is better than the baseline's."""
    sign, d = -1 if results.lower_is_better else 1, results.arms[label].difference
    return d is not None and sign * d.mean > 0 and formatting.shown(d)


def opening(results: Results) -> str:
    """Return the verdict, one plain sentence; the intervals it rests on stand beside it."""
    chosen = choice(results)
    label, base = chosen.arm, results.baseline
    row, name = results.arms[label], measures.written(results.measure)
    if chosen.why == "alone" or row.status == "incomplete" or len(row.seeds) == 1:
        return sentence(results, label)
    if chosen.why == "saves":
        r, what = chosen.distance.ratio, "energy"
        roles = _roles(row)
        charged = f", {roles} included" if roles else ""
        than = f"plain training with the same {name}{charged}"
        text = f"{label} takes {formatting.times(r, what, band=False)} than {than}"
        return f"{text}; {_against(results, label)}."
    energy = _plainly(results, label)
    if chosen.why == "keeps":
        inside = "; shorter plain training does that for less" if chosen.distance.inside else ""
        text = f"{label} takes {energy} and {_kept(results, label)}{inside}."
    elif label == results.arm:
        text = f"{label} takes {energy}; {_against(results, label)}{_serving(results, label)}."
    elif chosen.why == "better":
        text = (
            f"No arm is shown to cost less than {base} and keep its {name}; {label} "
            f"{_gained(results, label)} for {energy}."
        )
    else:
        first = f"No arm is shown to cost less than {base}"
        cheaper = chosen.why == "cheaper"
        first += f" and keep its {name}; nearest comes" if cheaper else " or to be better; best is"
        text = f"{first} {label}: {energy}, {_against(results, label)}."
    return text


def left_out(results: Results) -> str:
    """Name what the arm of the verdict and the baseline build on at a cost that nobody knows."""
    names = dict.fromkeys(a for a in (headline(results), results.baseline) if a is not None)
    return not_counted(*(results.arms[a] for a in names))


def _plainly(results: Results, label: str) -> str:
    """Return an arm's energy beside the baseline's, without its interval."""
    key, base = cost(results, label), results.baseline
    charged = _roles(results.arms[label], *([results.arms[base]] if base else []))
    included = f", {charged} included" if charged else ""
    what = "energy" if charged else "training energy"
    if key == "inference_energy":
        what, included = f"energy per {results.unit}", " (from which it goes on)"
    r = results.arms[label].ratio(key)
    if not formatting.shown(r):
        return f"an {what} that shows no difference to {base}{included}".replace("an t", "a t")
    return f"{formatting.times(r, what, band=False)} than {base}{included}"


def _roles(*rows: ArmResults) -> str:
    """Return what the rows build on at a known cost: "base and teacher"."""
    known = (u.role for r in rows for u in r.uses if u.energy_j.value is not None)
    return " and ".join(dict.fromkeys(known))


def _kept(results: Results, label: str) -> str:
    if is_better(results, label):
        return _gained(results, label)
    name, lost = measures.written(results.measure), margin(results)
    return f"keeps its {name}" + (f" within {lost}" if lost else "")


def _gained(results: Results, label: str) -> str:
    """Return "gains 26.7 points of accuracy", "lowers the RMSE by 0.21 px"."""
    measure, d = results.measure, results.arms[label].difference
    name, mean = measures.written(measure), d.mean if d else 0.0
    if measures.is_share(measure):
        many = formatting.fixed(abs(mean) * 100)
        return f"{'gains' if mean > 0 else 'loses'} {many} points of {name}"
    size = formatting.figures(abs(mean)) + measures.suffix(measure)
    return f"{'raises' if mean > 0 else 'lowers'} the {name} by {size}"


def _against(results: Results, label: str) -> str:
    """Return what an arm does to the metric, and how sure that is."""
    d = results.arms[label].difference
    if d is None or d.low is None:
        return f"its {measures.written(results.measure)} is not compared"
    if d.verdict == "keeps":
        return f"it {_kept(results, label)}"
    if d.verdict == "loses":
        return f"it {_gained(results, label)}"
    name = measures.written(results.measure)
    mean = formatting.points(results.measure, d.mean, digits=1)
    return f"{name} {mean}, {formatting.decided(d)}"


def _serving(results: Results, label: str) -> str:
    """Return what one answer of the arm takes, where that differs and is not what it is judged
    by."""
    r = results.arms[label].ratio("inference_energy")
    if cost(results, label) == "inference_energy" or not formatting.shown(r):
        return ""
    return f"; it serves with {formatting.times(r, f'energy per {results.unit}', band=False)}"


def cost(results: Results, label: str) -> str:
    """Return the energy an arm is judged by: with all it builds on; one image's where it goes on
    from the baseline itself."""
    baseline = f"{results.name}/{results.baseline}"
    goes_on = any(u.name == baseline for u in results.arms[label].uses)
    return "inference_energy" if goes_on else "train_energy_with_reuse"


def _is_bound(row: ArmResults) -> bool:
    """Whether an arm trained on all tasks of a stream at once, which no stream allows."""
    return row.continual is not None and row.continual.all_at_once


def keeps(results: Results, label: str) -> bool:
    """Whether an arm's interval lies within the margin, or there is no metric at all that it could
    lose."""
    d = results.arms[label].difference
    return d.verdict == "keeps" if d else all(r.gain.mean is None for r in results.arms.values())


def sentence(results: Results, label: str) -> str:
    """Return what the records show of one arm, beside the baseline where there is one."""
    row, base, measure = results.arms[label], results.baseline, results.measure
    name = measures.written(measure)
    if row.status == "incomplete":
        tried = ", ".join(
            f"{n} {status}" if n > 1 else status for status, n in row.attempts.items()
        )
        return (
            f"{label} has no finished run ({tried}); "
            f"{formatting.si(row.spent.energy_j.value, 'J')} were spent on it."
        )
    scored = row.gain.mean is not None
    bound = ", trained on all tasks at once as no stream allows," if _is_bound(row) else ""
    reached = (
        f"{label}{bound} reached {formatting.spread(measure, row.gain)}"
        if scored
        else f"{label} (no {name} recorded)"
    )
    if scored and measure.name != measures.DEFAULT:
        reached += f" {name}"
    if not row.vs_baseline or len(row.seeds) == 1:
        return _alone(row, reached if scored else f"{label} took", scored, name) + not_counted(row)
    key = cost(results, label)
    if key == "inference_energy":
        text = (
            f"{reached}, going on from {base}, with "
            f"{_energy(results, label, key, f'energy per {results.unit}')}; "
            f"{_gain(results, label)}."
        )
        text += f" Making it: {_energy(results, label, 'train_energy_with_reuse', 'energy')}."
    else:
        what = "energy" if builds_on(results, label) else "training energy"
        text = f"{reached} with {_energy(results, label, key, what)}; {_gain(results, label)}."
    return text + not_counted(row, *(results.arms[base],) if base else ()) + _partly(row)


def _alone(row: ArmResults, reached: str, scored: bool, name: str) -> str:
    """Return the sentence on an arm that is compared with none, or by one seed: joules, and no
    ratio."""
    line = row.train_energy_with_reuse_j.value
    joules = formatting.reading(row.train_energy_with_reuse_j, "J") if line is not None else ""
    what = (
        "energy, with all it builds on" if line != row.train_energy_j.value else "training energy"
    )
    one = " (one seed: no spread is known)" if len(row.seeds) == 1 else ""
    if not scored:
        return (
            f"{reached} {f'{joules} of {what}' if joules else 'an unknown energy'}; no {name} "
            f"was recorded{one}."
        )
    return reached + (f" for {joules} of {what}" if joules else "") + one + "."


def _energy(results: Results, label: str, key: str, what: str) -> str:
    """Return an arm's energy beside the baseline's: "2.1 times less energy (1.9–2.3) than full",
    and its own share."""
    row, base = results.arms[label], results.baseline
    r, own = row.ratio(key), row.ratio("train_energy")
    if r is None or r.low is None:
        return f"an unknown share of the {what} of {base}"
    text = f"{formatting.times(r, what)} {'than' if formatting.shown(r) else 'to'} {base}"
    if r.low == r.high == 1:
        text = f"{formatting.times(r, what)} as {base}"
    charged = builds_on(results, label)
    if key != "train_energy_with_reuse" or not charged:
        return text
    share = (
        f"; own training {formatting.factor(own)}, {formatting.factor_band(own).removeprefix('×')}"
        if own and own.low
        else ""
    )
    return f"{text} ({charged} included{share})"


def _gain(results: Results, label: str) -> str:
    measure, d = results.measure, results.arms[label].difference
    name = measures.written(measure)
    if not d:
        return f"no {name} to compare"
    band = formatting.interval(measure, d)
    text = f"{name} {formatting.points(measure, d.mean)}" + (
        f" (95\u00a0% interval {band})" if band else ""
    )
    decided = formatting.decided(d, margin(results))
    if results.margin == 0:
        decided = {"keeps": "kept", "loses": "loses"}.get(decided, decided)
        decided += "" if measure.higher_is_better else " (less is better)"
    return f"{text}: {decided}"


def margin(results: Results) -> str:
    """Return how much may be lost, in words: "0.5 points", "0.2 px", "0.1 of RMSE"; "" for
    nothing."""
    if results.margin == 0:
        return ""
    points = "point" if results.margin == 1 else "points"
    measure = results.measure
    of = measures.suffix(measure) or f" of {measures.written(measure)}"
    return f"{results.margin:g}" + (f" {points}" if measures.is_share(measure) else of)


def not_counted(*rows: ArmResults) -> str:
    """Name what the rows build on at a cost that nobody knows."""
    names = list(dict.fromkeys(n for row in rows for n in row.unknown))
    return f" Not counted, for its cost is not known: {', '.join(names)}." if names else ""


def builds_on(results: Results, label: str) -> str:
    """Return what is charged in a comparison of an arm to the baseline: "the base of full and
    lora"; "" for nothing."""
    known = {
        a: [u for u in results.arms[a].uses if u.energy_j.value is not None]
        for a in (results.baseline, label)
        if a is not None
    }
    roles = dict.fromkeys(u.role for uses in known.values() for u in uses)
    return (
        f"the {' and '.join(roles)} of {' and '.join(a for a, uses in known.items() if uses)}"
        if roles
        else ""
    )


def _partly(row: ArmResults) -> str:
    return " Not every seed finished." if row.status == "partly done" else ""
