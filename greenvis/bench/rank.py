"""`greenvis bench rank`: does scoring bases without training order them as fine-tuning each of them
does? Minutes on one core.

Trains the bases and fine-tunes each (recipes/reuse/rank.yaml), then ranks them. Finished runs are
kept and not trained again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from greenvis.bench import _floor, _output
from greenvis.bench._options import Images, Out, Runs
from greenvis.core import files
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.experiment.recipe import load_recipe
from greenvis.planning.rank import METHODS, rank
from greenvis.report import archive

RECIPE = Path(__file__).parents[2] / "recipes/reuse/rank.yaml"


def run(
    out: Out = None,
    recipe: Annotated[
        Path, typer.Option(help="whose arms fine-tune one base each", show_default=RECIPE.name)
    ] = RECIPE,
    runs: Runs = "runs",
    images: Images = 500,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return what `greenvis.planning.rank.rank` says of the bases that a recipe's arms start from,
    on the recipe's data.

    recipe: its arms fine-tune one base each ("run:…"), all of it, with no technique. out: a folder
    to write report.md and results.json to. Raises BadInput where the recipe is not there (it comes
    with the repository, not with the package).
    """
    if not recipe.is_file():
        raise BadInput(
            f"the recipe {recipe} is not there: run this benchmark in a copy of the repository"
        )
    read = load_recipe(recipe, overrides)
    bases = list(dict.fromkeys(str(read.arm(name).model.init) for name in read.arms))
    records = session.run(read, runs=runs)
    result = rank(bases, str(recipe), images=images, runs=runs)
    result["repeatability"] = _floor.repeatability()
    if out is not None:
        # no paths of this machine
        content = {**result, "data": recipe.name, "record": Path(result["record"]).name}
        _output.write(out, content, _report(result))
        bases_at = {Path(runs) / b.removeprefix("run:").partition("/")[0] for b in bases}
        if packed := archive.pack([records, *sorted(p for p in bases_at if p.is_dir())]):
            files.write(out / archive.NAME, packed.content)
    return result


def _report(result: dict[str, Any]) -> str:
    spent, tuning = result["energy_j"], result["tuning_energy_j"]
    rows = sorted(result["rows"], key=lambda row: -row.get("tuned_accuracy", 0.0))
    lines = [
        "# Choosing a base before paying for it", "",
        f"Bases trained here, scored by the features of {result['images']} training images, and "
        "what full fine-tuning of "
        "each reached (means over seeds). Higher scores should stand beside higher accuracies.", "",
        f"The whole ranking, all scores of all bases, took {_floor.joules(spent['value'])} J "
        f"({_floor.joules(spent['low'])}–{_floor.joules(spent['high'])}, "
        f"{spent['provenance']})." + (f" Fine-tuning each base once took {_floor.joules(tuning)} J."
        if tuning else ""), "",
        "| base | fine-tuned | " + " | ".join(METHODS) + " | dimensions | J |",
        "|---" * (len(METHODS) + 4) + "|",
    ]  # fmt: skip
    for row in rows:
        scores = " | ".join(f"{row[method]:.3f}" for method in METHODS)
        tuned = f"{row['tuned_accuracy']:.4f}" if "tuned_accuracy" in row else "not on record"
        lines.append(
            f"| {row['base']} | {tuned} | {scores} | {row['dim']} "
            f"| {_floor.joules(row['energy_j'])} |"
        )
    lines += ["", _floor.sentence(None, repeatability=result.get("repeatability"))]
    if wide := [row["base"] for row in rows if row["dim"] >= result["images"]]:
        lines += ["", f"sfda says nothing of {', '.join(wide)}: with as many dimensions as images "
                      "any labels score about 1. "
                  "Its correlation below counts these scores all the same."]  # fmt: skip
    if result["correlation"]:
        lines += ["", "| score | weighted tau | tau |", "|---|---|---|"]
        lines += [
            f"| {m} | {c['weighted_tau']:+.3f} | {c['tau']:+.3f} |"
            for m, c in result["correlation"].items()
        ]
        lines += [
            "",
            f"Rank correlations over {len(rows)} bases of one machine and one data set: a sign, "
            "not a law.",
        ]
    return "\n".join([*lines, "", "Repeat it: `greenvis bench rank --out reports/bench-rank`", ""])
