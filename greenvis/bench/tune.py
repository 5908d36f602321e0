"""`greenvis bench tune`: what `greenvis tune` says a model's training would save, and what a run
with its settings does save, beside the same loop written by hand. Some minutes on one core.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
import yaml

from greenvis.bench import _floor, _output
from greenvis.bench._digits import built, digits
from greenvis.bench._options import Out, Rounds
from greenvis.experiment.optim import threads
from greenvis.experiment.session import run as run_recipe
from greenvis.meters import record
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.planning.tune import tune
from greenvis.tasks.answers import logits_of

MODELS = ("timm/resnet18", "timm/vit_tiny_patch16_224", "timm/tf_efficientnet_lite0")
HAND, RECIPE, TUNED = "loop by hand", "recipe", "recipe, tuned"
LEAST = 0.85  # of the recipe's energy, with what `tune` says
STEP = 0.93  # of the CPU time of the loop by hand, with a recipe's defaults
TEST, LR = 128, 1e-3


def run(
    out: Out = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="may be repeated")
    ] = None,
    side: Annotated[int, typer.Option(min=8, help="pixels")] = 64,
    images: Annotated[int, typer.Option(min=8, max=500, help="to train on, one epoch")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 32,
    rounds: Rounds = 3,
) -> dict[str, Any]:
    """Return {"rows": [{"model", "arm", "settings", "cpu_s", "vs_hand", "vs_recipe", "accuracy"}],
    "tuned": {model: what `planning.tune.tune` returned}, …}: medians over rounds.

    CPU time is that of an epoch's steps, without evaluation; arms take turns, the order turning
    around every other round; each round is another seed. One thread each.
    """
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    tuned: dict[str, Any] = {}
    with threads(1), tempfile.TemporaryDirectory() as folder:
        for ref in models or MODELS:
            content = _recipe(ref, side, images, batch)
            path = Path(folder, "recipe.yaml")
            path.write_text(yaml.safe_dump(content))
            tuned[ref] = tune(path, rounds=rounds, runs=Path(folder, "runs"))
            arms = _arms(content["model"], path, tuned[ref], side, images, batch)
            rows += _rows(ref, tuned[ref], _measured(arms, rounds))
    result = {
        "rows": rows, "tuned": tuned, "side": side, "images": images, "batch": batch,
        "rounds": rounds, "machine": cpu(), "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
    return result


Steps = Callable[[int], tuple[float, float]]  # of a seed: CPU seconds of its steps, accuracy


def _recipe(ref: str, side: int, images: int, batch: int) -> dict[str, Any]:
    size = {"img_size": side} if "vit" in ref else {}
    return {
        "name": "tuned",
        "data": {"name": "digits", "train": images, "test": TEST, "img_size": side, "in_chans": 3},
        "model": {"ref": ref, **size},
        "train": {"epochs": 1, "batch_size": batch, "lr": LR, "eval_every": 0, "threads": 1},
        "arms": {"plain": {}},
        "meter": {"codecarbon": False},
    }


def _arms(
    model: Mapping[str, Any],
    path: Path,
    tuned: Mapping[str, Any],
    side: int,
    images: int,
    batch: int,
) -> dict[str, Steps]:
    def by_hand(seed: int) -> tuple[float, float]:
        return _by_hand(built(dict(model), seed), side, images, batch)

    def recipe(seed: int, settings: Sequence[str] = ()) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as runs:
            overrides = [f"train.seeds=[{seed}]", *settings]
            (done,) = map(
                record.read, record.find([run_recipe(path, overrides=overrides, runs=runs)])
            )
        return done.sum("cpu_s", "train") or 0.0, float(done.facts["accuracy"])

    arms: dict[str, Steps] = {HAND: by_hand, RECIPE: recipe}
    if picked := _picked(tuned):
        arms[TUNED] = lambda seed: recipe(seed, picked)
    return arms


def _by_hand(model: torch.nn.Module, side: int, images: int, batch: int) -> tuple[float, float]:
    """Train as people write it, and return the CPU time of the steps and the accuracy."""
    x, y, of_test, labels = digits(side)
    x, y = x[:images], y[:images]
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    order = torch.randperm(len(y)).split(batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
    model.train()
    start = time.process_time()
    for rows in order:
        loss = F.cross_entropy(logits_of(model(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    took = time.process_time() - start
    model.eval()
    with torch.inference_mode():
        right = logits_of(model(of_test[:TEST])).argmax(-1) == labels[:TEST]
    return took, float(right.float().mean())


def _picked(tuned: Mapping[str, Any]) -> list[str]:
    """Return the overrides of the setting to take; none where it is as it is."""
    return next((row["set"] for row in tuned["rows"] if row["setting"] == tuned["pick"]), [])


def _measured(arms: Mapping[str, Steps], rounds: int) -> dict[str, list[tuple[float, float]]]:
    done: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for seed in range(rounds):
        for name in in_turn(arms, seed):
            done[name].append(arms[name](seed))
    return done


def _rows(
    ref: str, tuned: Mapping[str, Any], done: Mapping[str, Sequence[tuple[float, float]]]
) -> list[dict[str, Any]]:
    def beside(name: str, other: str) -> float:
        pairs = zip(done[name], done[other], strict=True)
        return round(statistics.median(a[0] / b[0] for a, b in pairs), 3)

    return [
        {
            "model": ref,
            "arm": name,
            "settings": (tuned["pick"] or "") if name == TUNED else "",
            "cpu_s": round(statistics.median(s for s, _ in each), 2),
            "vs_hand": beside(name, HAND),
            "vs_recipe": None if name == HAND else beside(name, RECIPE),
            "accuracy": round(100 * statistics.fmean(a for _, a in each), 1),
        }
        for name, each in done.items()
    ]


def _markdown(result: Mapping[str, Any], out: Path) -> str:
    rows, refs = result["rows"], [*result["tuned"]]
    saved = {row["model"]: row["vs_recipe"] for row in rows if row["arm"] == TUNED}
    plain = {row["model"]: row["vs_hand"] for row in rows if row["arm"] == RECIPE}
    enough = [ref for ref in refs if saved.get(ref, 1.0) <= LEAST]
    ahead = [ref for ref in refs if plain[ref] <= STEP]
    words = "" if refs == [*MODELS] else "".join(f" --model {ref}" for ref in refs)
    apart = max((own["floor"] for own in result["tuned"].values() if "floor" in own), default=None)
    options = " ".join(f"--{k} {result[k]}" for k in ("side", "images", "batch", "rounds"))
    lines = [
        "# What `greenvis tune` says is what a run saves", "",
        f"A run with what `greenvis tune` says takes at most {LEAST:g} of the CPU time as it is on "
        f"{len(enough)} of {len(refs)} models; a recipe with its defaults takes at most {STEP:g} "
        f"of the loop by hand on {len(ahead)}.", "",
        f"`greenvis bench tune{words} {options} --out {out}`, {result['seconds']} s on "
        f"{os.cpu_count()} logical CPUs, one thread, torch {result['torch']}. Scikit-learn's "
        f"digits at {result['side']} pixels, random weights, one epoch of AdamW. CPU time of the "
        "steps, with the meter and records in a recipe; medians over rounds, of ratios within a "
        "round; arms take turns. Where energy is estimated from CPU time, its ratio is the same. "
        "The loop by hand has PyTorch's AdamW as it comes and images in memory as the model takes "
        "them; a recipe fuses its optimizer, and reads and normalizes them.", "",
        *_floor.table(rows), "", "## What `greenvis tune` measured", "",
        *_floor.table([
            {"model": ref, "setting": row["setting"], "energy_ratio": row["ratio"],
             "between": f"{row['low']:.2f}–{row['high']:.2f}"}
            for ref, own in result["tuned"].items() for row in own["rows"]
        ]), "",
        _floor.sentence(apart, "trainings of a recipe as it is, within a round,"), "",
        *(f"- {ref}, {name}: left out: {why}."
          for ref, own in result["tuned"].items() for name, why in own["refused"].items()),
        *(f"- {ref}: tuning took {_floor.joules(own['tuning_j'])} J."
          for ref, own in result["tuned"].items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
