"""Many reports at a glance: what each technique saved and cost, and what each report found, as Markdown for a README."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput
from greenvis.report import verdict
from greenvis.report.words import MISSING, factor, points, shown

HEAD = ("technique", "measured in", "arm", "accuracy", "energy to train", "energy of an image")


def overview(folder: str | Path) -> dict[str, Any]:
    """Return {"techniques": [rows of `HEAD`], "reports": [{"name", "path", "command", "found"}]} of all reports in a folder.

    A technique's rows are the arms that differ from their report's baseline by that technique alone: accuracy against the
    baseline's, energies as ratios to its; bold where the seeds show a difference. found: a report's first sentence, or its
    title where it compares no arms. Raises BadInput for a folder without reports.
    """
    rows: list[dict[str, str]] = []
    reports: list[dict[str, str]] = []
    for path in sorted(Path(folder).glob("*/report.md")):
        its = {"name": path.parent.name, "path": path.as_posix()}
        try:
            found = json.loads((path.parent / "results.json").read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"{path.parent} holds a report.md, but no results.json to read: {error}") from error
        if "baseline" not in found:
            text = path.read_text()
            command = re.search(r"`(greenvis [^`]+)`", text)
            title = text.partition("\n")[0].removeprefix("# ")
            reports.append({**its, "command": command[1] if command else "", "found": f"{title}."})
            continue
        rows += [{**row, "measured in": path.as_posix()} for row in _rows(found)]
        reports.append({**its, "command": " ".join(found["command"]), "found": verdict.opening(found)})
    if not reports:
        raise BadInput(f"{folder} holds no reports: give the folder in which each report has a folder of its own")
    rows.sort(key=lambda row: (row["technique"], row["measured in"]))
    return {"techniques": rows, "reports": reports}


def markdown(found: Mapping[str, Any], beside: str | Path = ".") -> str:
    """Return the overview as Markdown, arms of one report in one row, with links from a file in the folder `beside`."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    grouped: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in found["techniques"]:
        grouped.setdefault((row["technique"], row["measured in"], row["against"]), []).append(row)
    for (technique, path, base), rows in grouped.items():
        first = [f"`{technique}`", f"[{Path(path).parent.name}]({_link(path, beside)}), against {base}"]
        lines.append("| " + " | ".join([*first, *("<br>".join(row[k] for row in rows) for k in HEAD[2:])]) + " |")
    lines += ["", "Energies are ratios to that arm's. Bold: a difference that the seeds show.", ""]
    for its in found["reports"]:
        lines.append(f"- **[{its['name']}]({_link(its['path'], beside)})**, `{its['command']}`: {its['found']}")
    return "\n".join(lines) + "\n"


def _rows(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    base = found["baseline"]
    if base is None:
        return
    common = _names(found["arms"][base])
    for label in found["order"]:
        arm = found["arms"][label]
        own = [name for name in _names(arm) if name not in common]
        against = arm.get("vs_baseline")
        if label == base or not against or len(own) != 1:
            continue
        change = against.get("accuracy")
        gain = MISSING if change is None else points(found["metric"], change["mean"])
        yield {
            "technique": own[0],
            "against": base,
            "arm": label,
            "accuracy": f"**{gain}**" if shown(change) else gain,
            "energy to train": _ratio(against.get("train_energy")),
            "energy of an image": _ratio(against.get("inference_energy")),
        }


def _names(arm: Mapping[str, Any]) -> list[str]:
    return [next(iter(technique)) for technique in arm.get("techniques") or ()]


def _ratio(change: Mapping[str, Any] | None) -> str:
    return f"**{factor(change)}**" if shown(change) else factor(change)


def _link(path: str, beside: str | Path) -> str:
    return Path(os.path.relpath(path, beside)).as_posix()
