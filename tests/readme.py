"""Write the generated parts of README.md anew: `make readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from greenvis import registry
from greenvis.report.overview import markdown, overview
from greenvis.report.words import factor, points

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- from here on: greenvis overview -->\n", "<!-- to here -->"
FIRST, LAST = "<!-- from here on: reports/flagship -->\n", "<!-- to here: reports/flagship -->"
WANTED = {"train_energy": 0.20, "inference_energy": 0.50}


def techniques() -> dict[str, str]:
    """Return the first paragraph of each technique's documentation."""
    return {name: " ".join((registry.find(name).__doc__ or "").split("\n\n")[0].split()) for name in registry.names()}


def measured() -> str:
    """Return the overview of the committed reports, as the README has it."""
    return markdown(overview(ROOT / "reports"), beside=ROOT)


def flagship() -> str:
    """Return the arms of the flagship's report, each against full fine-tuning, and which of its aims are reached."""
    found = json.loads((ROOT / "reports" / "flagship" / "results.json").read_text())
    lines = ["| arm | accuracy | against full | energy to train | energy of an image |", "|---|---|---|---|---|"]
    for name in found["order"]:
        arm = found["arms"][name]
        its, more = arm["accuracy"], arm.get("vs_baseline") or {}
        spread = f" ± {100 * its['std']:.1f}, {its['n']} seeds"
        change = points("accuracy", more["accuracy"]["mean"]) if more else "–"
        ratios = [factor(more[key]) if more else "1" for key in WANTED]
        lines.append("| " + " | ".join([name, f"{100 * its['mean']:.1f} %{spread}", change, *ratios]) + " |")
    return "\n".join([*lines, "", _aims(found["arms"]["flagship"]["vs_baseline"])]) + "\n"


def _aims(reached: dict[str, Any]) -> str:
    lost = -100 * reached["accuracy"]["mean"]
    p = reached["accuracy"].get("p_adjusted", reached["accuracy"]["p_value"])
    said = [
        f"Accuracy within half a point of full's: {'reached' if lost <= 0.5 else f'not reached, {lost:.1f} points are lost'} "
        f"({'difference shown' if p < 0.05 else 'no difference shown'}, p = {p:.2g})."
    ]
    for (key, most), what in zip(WANTED.items(), ("Training energy", "Energy of an image"), strict=True):
        ratio = reached[key]["ratio"]
        said.append(f"{what} {most:.2f} of full's: {'reached' if ratio <= most else 'not reached'}, {ratio:.2f}.")
    return " ".join(said)


def main() -> None:
    """Replace them all."""
    path = ROOT / "README.md"
    text = path.read_text()
    head, _, rest = text.partition(BEGIN)
    text = head + BEGIN + measured() + END + rest.partition(END)[2]
    head, _, more = text.partition(FIRST)
    text = head + FIRST + flagship() + LAST + more.partition(LAST)[2]
    table = "".join(f"| `{name}` | {does} |\n" for name, does in techniques().items())
    path.write_text(re.sub(r"(\| name \| what it does \|\n\|---\|---\|\n)(?:\|.*\n)+", lambda m: m[1] + table, text))


if __name__ == "__main__":
    main()
