"""`greenvis bench floor`: do two arms of one recipe that do the same work differ by less than the
noise floor that reports print? Some minutes on one core.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from greenvis.bench import _floor, _output
from greenvis.bench._options import Out
from greenvis.experiment.session import run as run_recipe
from greenvis.report import formatting
from greenvis.report import results as read_results

RECIPE: dict[str, Any] = {
    "name": "same",
    "data": {"name": "digits", "train": 800, "test": 200},
    "model": {"ref": "plain/convnet"},
    "train": {"epochs": 4, "batch_size": 32, "eval_every": 0, "threads": 1},
    "arms": {"one": {}, "other": {}},
    "meter": {"codecarbon": False},
}


def run(
    out: Out = None,
    trials: Annotated[int, typer.Option(min=2, help="each trains both arms once")] = 20,
) -> dict[str, Any]:
    """Return {"rows": [{"trial", "ratio", "floor"}], "counts": {floor: trials below it},
    "trials", …}.

    A trial runs a recipe of two arms alike and reads its report: the ratio of their training
    energies and the printed floor. A report's floor comes from these very arms; that of the trial
    before and of all others, and the band of `greenvis doctor --repeat`, do not.
    """
    started = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "same.yaml")
        path.write_text(yaml.safe_dump(RECIPE))
        for trial in range(trials):
            records = run_recipe(
                path, overrides=[f"train.seeds=[{trial}]"], runs=Path(folder, str(trial))
            )
            rows.append({"trial": trial, **_read(records)})
    band = _floor.repeatability()
    result = {
        "rows": rows, "trials": trials, "counts": counts(rows, band["high"]),
        "repeatability": band, "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, str(out)))
    return result


def _read(records: Path) -> dict[str, Any]:
    """Return what a trial's report says of its two arms."""
    results = read_results([records], baseline="one")
    floor = results.noise_floor
    assert floor is not None
    assert floor.training is not None
    spent = [results.arms[a].train_energy_j.value or math.nan for a in ("other", "one")]
    return {"ratio": spent[0] / spent[1], "floor": floor.training.ratio}


def counts(rows: Sequence[dict[str, Any]], band: float) -> dict[str, str]:
    """Return in how many trials the two arms differ by no more than each floor, "n of m".

    Args:
        rows: Of `run`.
        band: How far the same work reads from its middle from one time to another.
    """
    apart = [math.exp(abs(math.log(row["ratio"]))) for row in rows]
    floors = [row["floor"] for row in rows]
    others = [max(floors[:i] + floors[i + 1 :]) for i in range(len(rows))]
    tests = {
        "printed in its own report": [a <= f + 1e-9 for a, f in zip(apart, floors, strict=True)],
        "printed by the trial before": [
            a <= f for a, f in zip(apart[1:], floors[:-1], strict=True)
        ],
        "greatest that the others print": [a <= f for a, f in zip(apart, others, strict=True)],
        "band of `greenvis doctor --repeat`": [a <= band for a in apart],
    }
    return {name: f"{sum(below)} of {len(below)}" for name, below in tests.items()}


def _markdown(result: dict[str, Any], out: str) -> str:
    rows, trials = result["rows"], result["trials"]
    apart = [math.exp(abs(math.log(row["ratio"]))) for row in rows]
    lines = [
        "# How far two arms alike read apart, beside the noise floors that reports print", "",
        f"In {trials} trials of two arms that do the same work their training energies read "
        f"×{formatting.figures(max(apart), 3)} apart or less, in the middle "
        f"×{formatting.figures(sorted(apart)[trials // 2], 3)}; the second trained took more than "
        f"the first in {sum(row['ratio'] > 1 for row in rows)}.", "",
        f"`greenvis bench floor --trials {trials} --out {out}`, {result['seconds']} s on "
        f"{os.cpu_count()} logical CPUs, torch {result['torch']}, beside whatever else the machine "
        "did. A small convolutional network on scikit-learn's digits, one seed per arm and trial. "
        "A report's own floor is made of the arms it has, so that these cannot exceed it; the "
        "floors of other reports and the band were made without them.", "",
        "| floor | trials whose two arms differ by no more |", "|---|---|",
        *(f"| {name} | {count} |" for name, count in result["counts"].items()), "",
        _floor.sentence(max(apart), "these arms"), "",
        *_floor.table([
            {"trial": row["trial"], "energy_ratio": row["ratio"],
             "printed floor": f"×{formatting.figures(max(row['floor'], 1.001), 3)}"}
            for row in rows
        ]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
