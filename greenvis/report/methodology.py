"""The part of a report that says how far to trust it: generated from the results, so it cannot be
left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from greenvis.report import cached_outputs, formatting, teachers, verdict
from greenvis.report.formatting import si

Section = dict[str, Any]  # {"title", "items": [text], "table": None | {"head", "rows"}}


def sections(results: dict[str, Any]) -> list[Section]:
    """Return the sections, each {"title", "items", "table"}."""
    return [
        _section("What is counted", _counted(results)),
        {"title": "Sources of energy", "items": [], "table": _sources(results)},
        _section("Carbon intensity", _grid(results)),
        _section("Not counted", results["not_counted"]),
        _section("Runs", _runs(results)),
        _section("Cross-check and disturbance", _checks(results)),
        _predicted(results),
        cached_outputs.section(results),
        teachers.section(results),
        _section("Notes of the runs", results["notes"][:50]),
        _section("Environment and data", _environment(results)),
    ]


def _section(title: str, items: list[str]) -> Section:
    return {"title": title, "items": items, "table": None}


def _counted(results: dict[str, Any]) -> list[str]:
    n = sorted(
        {len(results["arms"][a]["seeds"]) for a in results["order"] if results["arms"][a]["seeds"]}
    )
    seeds = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}" if n else "no"
    return [
        "Training energy is all energy of a run but its measurement (latency, FLOPs): set-up, "
        "training, evaluation, a "
        "teacher's forward passes, and every start that broke off before the one that finished. "
        "The mean over finished seeds.",
        "A teacher or a base that another run trained is charged whole in “base and teacher "
        "included”, which comparisons "
        "rest on first; own training is the run's own share. What others trained, at a cost nobody "
        "knows, is in neither.",
        f"Finished seeds per arm: {seeds}. Ratios and differences to the baseline are paired by "
        "seed; a ratio is a geometric "
        "mean.",
        "Bands (low–high) come from the coefficients of the sources below. All arms measured on "
        "one host share them, so they "
        "widen the joules, not the ratios. ± is the standard deviation over seeds.",
        _repeatability(results),
        *_repeated(results),
        *_intervals(results),
        *_chosen(results),
        f"Pricing model: {results['pricing_model']}. SCI follows ISO/IEC 21031 with R = one image; "
        "no certification is claimed.",
    ]


def _chosen(results: dict[str, Any]) -> list[str]:
    """Say on which images choices were made: held out ones, or, for all that is known, the
    test's."""
    reached = any(results["arms"][a].get("energy_to_baseline_j") for a in results["order"])
    read = (
        [
            f"Where an arm reached the baseline's {results['metric']} is read off test images, "
            "epoch by epoch."
        ]
        if reached
        else []
    )
    held = sorted(
        {d["held_out"] for d in results["data"] if isinstance(d, dict) and d.get("held_out")}
    )
    if held:
        many = " or ".join(f"{n:,}" for n in held)
        return [
            f"{many} training images were held out; thresholds and a target accuracy are chosen on "
            "them. On which images "
            "learning rates and epochs were chosen is not on record: where it was on the test, "
            "accuracies are too good.",
            *read,
        ]
    return [
        "No validation images were held out: learning rates, epochs and whatever else was chosen "
        "was chosen on test images "
        "or not at all, so that accuracies may be too good.",
        *read,
    ]


def _intervals(results: dict[str, Any]) -> list[str]:
    """Say what the intervals are, and that sentences, marks and tables rest on them alone."""
    if not results["comparisons"]:
        return [
            "No arm is compared with a baseline by two seeds or more: nothing is said to be better "
            "or cheaper."
        ]
    m, lost = results["comparisons"], verdict.margin(results)
    return [
        "Intervals of differences and ratios are Student's t, paired by seed, each at "
        f"{100 - 5 / m:.4g} %, so that those of all {m} arm(s) hold together with 95 % "
        "(Bonferroni). “Shown”, “keeps”, “loses” "
        "and bold are read off them and nothing else: a difference is shown where its interval "
        "leaves out no change.",
        f"An arm keeps the {results['metric']} where its whole interval lies above −{lost}, loses "
        "it where the whole interval "
        "lies below, and is not yet decided else; the seeds said to be wanting suppose that mean "
        "and scatter stay. One seed "
        "decides nothing.",
    ]


def _repeatability(results: dict[str, Any]) -> str:
    """Say how far the same work reads apart at another time, and whether bands hold that."""
    bands = [
        s["repeatability"]
        for s in results["sources"]
        if s.get("provenance") == "estimated" and s.get("repeatability")
    ]
    texts = {
        f"×{k['low']:.3g}–{k['high']:.3g}, {k.get('citation') or 'of unknown origin'}"
        for k in bands
    }
    if texts:
        return (
            "Bands hold how far the same work reads apart from one time to another: "
            f"{'; '.join(sorted(texts))}."
        )
    return (
        "How far the same work reads apart from one time to another is in no band here: on a "
        "shared machine of two CPUs, up to "
        "×1.78 between two days."
    )


def _repeated(results: dict[str, Any]) -> list[str]:
    """Say how well the energy of one image was told, where the records know."""
    worst = max(
        (results["arms"][a]["inference_energy_j"].get("spread", 0.0) for a in results["order"]),
        default=0.0,
    )
    return [
        "The energy of one image is the median of repeated readings; their quartile range ÷ "
        "√readings is "
        f"{100 * worst:.1f} % of it or less in each run. A neighbour's load that lasts through all "
        "readings is not in that."
    ] if worst else []  # fmt: skip


def _sources(results: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for s in results["sources"]:
        k = s.get("coefficient") or {}
        unit = f" {k.get('unit', '')}".rstrip()
        band = (
            f"{k['central']:g}{unit} "
            f"({k.get('low', k['central']):g}–{k.get('high', k['central']):g})"
            if "central" in k
            else formatting.MISSING
        )
        why = "; ".join(str(x) for x in (s.get("reason"), s.get("citation")) if x)
        provenance = (s.get("provenance") if "central" in k else None) or "not observed"
        rows.append(
            [
                s.get("name") or "?",
                s.get("source") or "none",
                s.get("scope") or formatting.MISSING,
                band,
                provenance,
                why,
            ]
        )
    return {
        "head": [
            "Component",
            "Source",
            "Scope",
            "Coefficient (band)",
            "Known how",
            "Why, and from where",
        ],
        "rows": rows,
    }


def _grid(results: dict[str, Any]) -> list[str]:
    out = []
    for g in results["carbon_intensity"]:
        if not isinstance(g, dict) or g.get("value") is None:
            continue
        band = (
            f" ({g['low']:g}–{g['high']:g})"
            if g.get("low") is not None and g.get("high") is not None
            else ""
        )
        year = f", {g['year']}" if g.get("year") else ""
        source = g.get("source") or "an unnamed source"
        assumed = (
            " ASSUMED: no place was given, so these grams are a guess at the world's average."
            if g.get("assumed")
            else ""
        )
        out.append(
            f"{g.get('zone', '?')}: {g['value']:g} g CO₂e per kWh{band}{year}, from "
            f"{source}.{assumed}"
        )
    if len(results["carbon_intensity"]) > 1:
        out.append(
            "The runs were priced with different grids: compare their joules, or give one grid for "
            "all."
        )
    if results["repriced"]:
        out.append(
            "The grams were priced anew with this intensity; the recorded one was set aside. "
            "Joules are unchanged."
        )
    pue = ", ".join(f"{p:g}" for p in results["pue"]) or "none recorded, 1 used"
    return [*(out or ["No carbon intensity is known: no grams are given."]), f"PUE: {pue}."]


def _runs(results: dict[str, Any]) -> list[str]:
    t = results["totals"]
    starts = ", ".join(f"{n} {s}" for s, n in t["attempts"].items())
    out = [
        f"{t['runs']} run(s), started {sum(t['attempts'].values())} time(s): {starts}. All "
        f"together: {_spent(t)}."
    ]
    if t["unfinished_energy_j"]["value"]:
        lost = si(t["unfinished_energy_j"]["value"], "J")
        out.append(
            f"Of this, starts that crashed, failed or were stopped took {lost}: kept in all totals."
        )
    repeated = sum(
        results["arms"][a]["spent"]["repeated_energy_j"]["value"] or 0 for a in results["order"]
    )
    if repeated:
        out.append(
            "Starts that led to no shown result (repeated with --fresh, or broken off since) took "
            f"{si(repeated, 'J')}."
        )
    if t["nested_runs"]:
        out.append(
            f"{t['nested_runs']} start(s) ran inside another record's process: counted once in the "
            "total, by the outer."
        )
    if t.get("starts"):
        out.append(
            f"Starting {t['starts']} process(es) took {si(t['startup_j']['value'], 'J')}: imports, "
            "checks, reading data, first "
            "calls of the libraries. It is in the total, and in no arm."
        )
    if both := t.get("overlapping", {}).get("starts") and t["overlapping"]:
        out.append(
            f"{both['starts']} start(s) overlap: they ran at the same time on one counter of the "
            "whole machine, or in one "
            f"process. Together they read {si(both['seen_j']['value'], 'J')}, and "
            f"{si(both['counted_j']['value'], 'J')} of it "
            "is counted: each joule once. What runs saw side by side is divided among them in "
            "equal parts, for nothing tells "
            "whose it was; a run that lies inside another shows what it saw."
        )
    older = sum(
        results["arms"][a]["spent"]["older_inputs_energy_j"]["value"] or 0 for a in results["order"]
    )
    if older:
        out.append(
            f"Runs of earlier versions of the same arms (other inputs) took {si(older, 'J')}: in "
            "the totals, not in the tables."
        )
    if t["attempts"].get("crashed"):
        out.append(
            "Crashed: the record has no end, as after kill -9 or a power cut. What was observed up "
            "to its last line counts; "
            "what came after (one sample's interval at most) is not."
        )
    for row in results["incomplete"][:20]:
        why = f" ({row['reason']})" if row["reason"] else ""
        tried = f"{', '.join(row['attempts'])}{why}, {si(row['energy_j']['value'], 'J')} spent"
        out.append(f"Not finished: {row['arm']}, seed {row['seed']}: {tried}.")
    if len(results["incomplete"]) > 20:
        out.append(f"… and {len(results['incomplete']) - 20} more that did not finish.")
    if results["damaged_lines"]:
        out.append(
            f"{results['damaged_lines']} damaged line(s) in the records were skipped; totals are "
            "cumulative, so a damaged line "
            "costs at most what was observed since the one before."
        )
    if results.get("paused_s"):
        out.append(
            f"Processes stood still for {formatting.duration(results['paused_s'])} (stopped or "
            "suspended): what the machine and their "
            "memory drew meanwhile is in the records, but not charged to the runs."
        )
    if results["missing_ranks"]:
        out.append(
            f"{results['missing_ranks']} process record(s) are missing: the energy is too low by "
            "them."
        )
    return out


def _spent(totals: dict[str, Any]) -> str:
    e, g = totals["energy_j"]["value"], totals["carbon_g"]["value"]
    if e is None:
        return "energy unknown"
    return (
        f"{formatting.reading(totals['energy_j'], 'J')} ({formatting.figures(e / 3600, 2)} Wh)"
        + (f", {formatting.reading(totals['carbon_g'], 'g')} CO₂e" if g is not None else "")
        + f"; {formatting.lamp(e)} (10 W × time)"
    )


def _checks(results: dict[str, Any]) -> list[str]:
    out = _codecarbon([c for c in results["crosscheck"] if c["ratio"] is not None])
    if results["steal_s"] is not None and results["cpu_s"]:
        stolen, used = (
            formatting.duration(results["steal_s"]),
            formatting.duration(results["cpu_s"]),
        )
        out.append(
            f"Time stolen by the machine's other guests: {stolen} beside {used} of CPU time."
        )
    return out + _same_network(results)


def _codecarbon(checks: list[dict[str, Any]]) -> list[str]:
    """Return what codecarbon says of all runs together, and each run it departs on."""
    if not checks:
        return ["No cross-check by codecarbon was recorded."]
    ratios = [c["ratio"] for c in checks]
    outside = [c for c in checks if c["within_band"] is False]
    unknown = sum(c["within_band"] is None for c in checks)
    where = f"{len(outside)} of them OUTSIDE our band" if outside else "all within our band"
    out = [
        f"codecarbon ran beside {len(checks)} run(s) and read {formatting.figures(min(ratios))} to "
        f"{formatting.figures(max(ratios))} "
        f"times our energy, {where if not unknown else where + f' ({unknown} without)'}. Without a "
        "live counter it, too, "
        "multiplies CPU time by watts, by default the same 4 W: this checks the observation and "
        "the sums, not the watts."
    ]
    out += [
        f"codecarbon on {c['arm']}, seed {c['seed']}: {si(c['energy_j'], 'J')} against our "
        f"{si(c['own_j'], 'J')} "
        f"({formatting.figures(c['ratio'])} times), OUTSIDE our band."
        for c in outside[:20]
    ]
    return out + ([f"… and {len(outside) - 20} more outside."] if len(outside) > 20 else [])


def _same_network(results: dict[str, Any]) -> list[str]:
    """Say how far arms that serve a network of the same MACs and parameters are apart: that much is
    noise here."""
    alike: dict[tuple[float, float], list[str]] = {}
    for a in results["order"]:
        row = results["arms"][a]
        if row["macs"] and row["params"] and row["inference_energy_j"]["value"]:
            alike.setdefault((row["macs"], row["params"]), []).append(a)
    out = []
    for (macs, params), names in alike.items():
        rows = [results["arms"][a] for a in names]
        joules = sorted(r["inference_energy_j"]["value"] for r in rows)
        slow = sorted(
            r["latency_ms"]["p50"] for r in rows if r["latency_ms"] and r["latency_ms"].get("p50")
        )
        if len(names) < 2:
            continue
        latency = (
            f" and {si(slow[0] / 1e3, 's')} to {si(slow[-1] / 1e3, 's')} of latency"
            if len(slow) > 1
            else ""
        )
        who = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        out.append(
            f"{who} answer with {si(macs)} MACs and {si(params)} parameters alike, yet read "
            f"{si(joules[0], 'J')} to "
            f"{si(joules[-1], 'J')} per image{latency}: where the networks are the same, this is "
            "the noise of timing here, "
            "and smaller differences between other arms mean nothing."
        )
    return out[:5]


def _predicted(results: dict[str, Any]) -> Section:
    """Return the plan's prediction beside what it came to, where a plan was made."""
    rows = []
    for a in results["order"]:
        p = results["arms"][a].get("predicted")
        if p:
            cells = [
                (p.get("energy_j"), _joules),
                (p.get("wall_s"), formatting.duration),
                (p.get("flops"), si),
            ]
            rows.append([a, *(_forecast(f, form) for f, form in cells)])
    head = [
        "Arm",
        "Energy: predicted → actual",
        "Time: predicted → actual",
        "FLOPs: predicted → actual",
    ]
    text = (
        "Training and evaluation of one seed, as `greenvis plan` put it before from a few steps, "
        "and the mean over seeds "
        "after; × is actual ÷ predicted. Grams follow the joules. A busy machine stretches time "
        "more than energy."
    )
    return {
        "title": "Predicted and actual",
        "items": [text] if rows else [],
        "table": {"head": head, "rows": rows} if rows else None,
    }


def _joules(value: float) -> str:
    return si(value, "J")


def _forecast(f: dict[str, Any] | None, form: Callable[[float], str]) -> str:
    if not f:
        return formatting.MISSING
    ratio = "" if f["ratio"] is None else f", ×{formatting.figures(f['ratio'])}"
    inside = "inside the band" if f["inside"] else "OUTSIDE the band"
    return (
        f"{form(f['value'])} ({form(f['low'])} to {form(f['high'])}) → {form(f['actual'])}{ratio}, "
        f"{inside}"
    )


def _environment(results: dict[str, Any]) -> list[str]:
    out = []
    for key, title in (
        ("cpu", "Processor"),
        ("gpu", "GPU"),
        ("os", "System"),
        ("host", "Host"),
        ("versions", "Versions"),
    ):
        out += [f"{title}: {_flat(v)}" for v in results["environment"][key][:5]]
    out += [f"Data: {_flat(v)}" for v in results["data"][:10]]
    out += [f"Model: {_flat(v)}" for v in results["models"][:10]]
    out += [f"Code: {_flat(v)}" for v in results["git"][:5]]
    return out


def _flat(value: Any) -> str:
    """Return a record's value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items() if v not in (None, "", [], {}))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
