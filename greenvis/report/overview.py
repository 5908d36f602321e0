"""Many reports at a glance: what each technique saved and cost, and what each report shows, as
Markdown for a README."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis.core import files, yamlfile
from greenvis.errors import BadInput
from greenvis.report import floor, frontier, markup, stored, verdict
from greenvis.report.estimates import Ratio
from greenvis.report.formatting import MISSING, factor, factor_band, interval, points, shown
from greenvis.report.measures import DEFAULT, written
from greenvis.report.shape import Results

HEAD = (
    "technique", "measured in", "arm", "metric", "verdict", "energy to train, base and teacher "
                                                            "included", "own share",
    "energy of an image", "beside plain training", "noise floor", "differs in",
)  # fmt: skip
TEXTS = ("arm", "beside plain training", "differs in")  # columns without Markdown of ours
ALONE = "the technique alone"
# settings of `train` that change no result
ASIDE = ("seeds", "threads", "workers", "checkpoint_every_s")


def overview(folder: str | Path) -> dict[str, Any]:
    """Sum up all reports in a folder.

    A technique's rows are the arms that have that technique and no other more than their report's
    baseline: the metric (accuracy where none is named) against the baseline's, energies as ratios
    to its, each with its interval; bold where no change lies outside it. "beside plain training"
    is the distance to the frontier. "differs in" comes from comparing the two arms' recipes: the
    technique alone, or what else.

    Args:
        folder: one in which each report has a folder.

    Returns:
        {"techniques": [rows of `HEAD`], "reports": [{"name", "path", "command", "found"}]}; "found"
        is a report's first sentence, or its title where it compares no arms.

    Raises:
        BadInput: for a folder without reports.
    """
    rows: list[dict[str, str]] = []
    reports: list[dict[str, str]] = []
    for path in sorted(Path(folder).glob("*/report.md")):
        entry = {"name": path.parent.name, "path": path.as_posix()}
        try:
            content = files.read_json(path.parent / stored.NAME, "results", stored.MOST_BYTES)
        except BadInput as error:
            raise BadInput(
                f"{path.parent} holds a report.md, but no results.json to read: {error}"
            ) from error
        if not isinstance(content, dict) or "baseline" not in content:
            text = files.read_text(path, "report")
            command = re.search(r"`(greenvis [^`]+)`", text)
            title = text.partition("\n")[0].removeprefix("# ")
            reports.append(
                {**entry, "command": command[1] if command else "", "found": f"{title}."}
            )
            continue
        content = stored.read(path.parent / stored.NAME)
        apart = floor.brief(content)
        rows += [
            {**row, "measured in": path.as_posix(), "noise floor": apart} for row in _rows(content)
        ]
        reports.append(
            {
                **entry,
                "command": markup.shell(content.command),
                "found": verdict.opening(content) + verdict.left_out(content),
            }
        )
    if not reports:
        raise BadInput(
            f"{folder} holds no reports: give the folder in which each report has a folder of its "
            "own"
        )
    rows.sort(key=lambda row: (row["technique"], row["measured in"]))
    return {"techniques": rows, "reports": reports}


def markdown(
    summary: Mapping[str, Any], beside: str | Path = ".", columns: Sequence[str] = HEAD
) -> str:
    """Return the overview as Markdown, a row per arm.

    Args:
        summary: of `overview`.
        beside: the folder of the file that holds it: links lead from there.
        columns: some of `HEAD`.
    """
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in summary["techniques"]:
        path = row["measured in"]
        report = _link(Path(path).parent.name, path, beside)
        cells = {k: _cell(row, k) for k in HEAD}
        cells["technique"] = markup.code(row["technique"])
        cells["measured in"] = f"{report}, against {markup.md(row['against'])}"
        lines.append("| " + " | ".join(cells[k] for k in columns) + " |")
    lines += [
        "",
        "In brackets: intervals that hold for all arms of a report together with 95 %. Bold: “no "
        "change” lies outside. The metric is accuracy where none is named. Keeps: the whole "
        "interval lies above −0.5 points (or the report's own margin); loses: below; else it is "
        "not yet decided. Energies are times the baseline's; “not known” is the cost of what "
        "others trained, which is in no figure. Beside plain training: energy, base and teacher "
        "included, ÷ that of the frontier of plain training at the same metric. Noise floor: how "
        "far arms that did the same work read apart; unknown where none did.",
        "",
    ]
    for entry in summary["reports"]:
        line = f"{markup.code(entry['command'])}: {markup.md(entry['found'])}"
        lines.append(f"- **{_link(entry['name'], entry['path'], beside)}**, {line}")
    return "\n".join(lines) + "\n"


def _rows(results: Results) -> Iterator[dict[str, str]]:
    base, measure = results.baseline, results.measure
    if base is None:
        return
    common = results.arms[base].technique_names
    far = frontier.of_all(results)
    for label, arm in results.rows.items():
        own = [name for name in arm.technique_names if name not in common]
        if label == base or not arm.vs_baseline or len(own) != 1:
            continue
        change = arm.difference
        known = change if change and change.low is not None else None
        gain = f"{points(measure, known.mean)} ({interval(measure, known)})" if known else MISSING
        gain = f"**{gain}**" if shown(change) else gain
        other = f"{written(measure)} " if measure.name != DEFAULT else ""
        lacking = " + not known" if arm.unknown else ""
        yield {
            "technique": own[0],
            "against": base,
            "arm": label,
            "metric": other + gain,
            "verdict": known.verdict if known else "one seed",
            "energy to train, base and teacher included": _ratio(
                arm.ratio("train_energy_with_reuse")
            )
            + lacking,
            "own share": _ratio(arm.ratio("train_energy")),
            "energy of an image": _ratio(arm.ratio("inference_energy")),
            "beside plain training": (
                frontier.sentence(results, label, far[label])
                if label in far
                else f"{frontier.UNMEASURED}: no two plain arms"
            ),
            "differs in": ", ".join(differences(results.recipe, label, base)) or ALONE,
        }


def differences(recipes: list[Any], arm: str, base: str) -> list[str]:
    """Return in what two arms of recipes (YAML) differ beside their techniques: "train.lr"; ""
    alone where nothing says."""
    known = [r for r in map(_read, recipes) if arm in r["arms"] and base in r["arms"]]
    out = {d for r in known for d in _different(_resolved(r, arm), _resolved(r, base))}
    return sorted(out) if known else ["no recipe at hand"]


def _read(text: Any) -> dict[str, Any]:
    try:
        recipe = yamlfile.parse(text, "its recipe") if isinstance(text, str) else text
    except BadInput:  # a record of other hands
        recipe = None
    return (
        recipe
        if isinstance(recipe, dict) and isinstance(recipe.get("arms"), dict)
        else {"arms": {}}
    )


def _resolved(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an arm with the recipe's own model, train and stream filled in, as `Recipe.arm` does;
    without its techniques."""
    spec, model = recipe["arms"][name] or {}, recipe.get("model") or {}
    own = spec.get("model") or {}
    other = own.get("ref", model.get("ref")) != model.get("ref")
    train = {**(recipe.get("train") or {}), **(spec.get("train") or {})}
    return {
        "model": {**({} if other else model), **own},
        "train": {k: v for k, v in train.items() if k not in ASIDE},
        "stream": {
            **((recipe.get("data") or {}).get("stream") or {}),
            **(spec.get("stream") or {}),
        },
        **{k: v for k, v in spec.items() if k not in ("model", "train", "stream", "techniques")},
    }


def _different(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Yield the paths at which two values differ: into sections, not into what they hold."""
    if not (isinstance(a, dict) and isinstance(b, dict)) or at.count(".") > 1:
        if a != b:
            yield at.removesuffix(".")
        return
    for key in {**a, **b}:
        yield from _different(a.get(key), b.get(key), f"{at}{key}.")


def _ratio(change: Ratio | None) -> str:
    text = factor(change)
    if text == MISSING:
        return text
    text += f" ({factor_band(change).removeprefix('×')})"
    return f"**{text}**" if shown(change) else text


def _link(text: str, path: str, beside: str | Path) -> str:
    return markup.link(text, Path(os.path.relpath(path, beside)).as_posix())


def _cell(row: Mapping[str, str], key: str) -> str:
    """Return a cell: figures have Markdown of ours, names become text."""
    return markup.md(row[key]) if key in TEXTS else row[key]
