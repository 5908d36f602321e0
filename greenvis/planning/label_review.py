"""Which labels of a run's data are to be looked at again, and what that is worth."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from greenvis import data
from greenvis.core import distributed, files
from greenvis.core.modes import in_mode
from greenvis.data import label_errors, sheets
from greenvis.data.splits import Split, stratified
from greenvis.errors import BadInput, nearest
from greenvis.experiment import loop
from greenvis.experiment.optim import threads
from greenvis.experiment.prepare import Prepared, Short
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.session import Session
from greenvis.meters import labels as prices
from greenvis.meters import pricing, record
from greenvis.meters.track import Tracker, track
from greenvis.tasks.answers import logits_of

COLUMNS = ("rank", "position", "id", "label", "suggested", "p_label", "p_suggested")


def review(
    run: str | Path,
    *,
    folds: int = 5,
    arm: str | None = None,
    out: str | Path | None = None,
    sheet: int = 48,
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Find the labels of a run's training images that are likely wrong, by confident learning on
    answers of models that have not seen the image: one a fold, trained as the run was.

    What that takes is metered, in a record of its own below `runs`. Where the recipe's noise was
    put there on purpose, how much of it was found is said, too.

    Args:
        run: A folder of records, "run:RECIPE/ARM", or a recipe's file.
        folds: Parts of the training images; each model trains on all but one.
        arm: Which of a recipe's file; the first where absent.
        out: Folder for suspects.csv and suspects.png; beside the record where absent.
        sheet: Images on the contact sheet.
        runs: Folder of run records.
        trust: Allow models given as package.module:function, which runs their code.
        say: Told how the work goes on.

    Returns:
        {"images", "suspects", "rate" (estimated share of wrong labels), "worth", "energy_j",
        "csv", "sheet", "planted"}; see `worth` and `planted`.

    Raises:
        BadInput: For a run that is none, or labels that are no classes.
    """
    distributed.require_single_process("greenvis labels")
    if folds < 2:
        raise BadInput(f"labels: {folds} folds leave no image unseen; give 2 or more")
    prepared = _prepared(run, arm, Session(Path(runs), trust, (), say))
    job, recipe = prepared.job, prepared.job.recipe
    labels = prepared.images.train.classes("greenvis labels").numpy()
    name = f"{job.arm.name}-labels"
    folder = Path(runs) / recipe.name / name / f"seed{job.seed}"
    header = {"name": recipe.name, "arm": name, "seed": job.seed, "recipe": recipe.text()}
    with (
        threads(job.arm.train.threads),
        track(recipe.name, dir=folder, country=recipe.meter.country,
              intensity=recipe.meter.intensity, pue=recipe.meter.pue, header=header,
              quiet=True) as tracker,
    ):  # fmt: skip
        probabilities = _unseen(prepared, folds, tracker, say)
        rows = label_errors.suspects(labels, probabilities)
        tracker.fact(label_suspects=len(rows))
    path = Path(out or folder)
    path.mkdir(parents=True, exist_ok=True)
    files_written = _write(prepared, labels, probabilities, rows, path, sheet)
    joint = label_errors.confident_joint(labels, probabilities)
    spent = pricing.run_energy(record.read(tracker.path))
    return {
        "images": len(labels),
        "suspects": len(rows),
        "rate": 1 - float(joint.trace()) / len(labels),
        "worth": worth(labels, probabilities, rows, joint),
        "energy_j": {"value": spent.value, "low": spent.low, "high": spent.high},
        **files_written,
        "planted": planted(prepared.images, rows),
    }


def worth(
    labels: np.ndarray, probabilities: np.ndarray, rows: np.ndarray, joint: np.ndarray
) -> dict[str, Any]:
    """Return what looking at suspects again is worth, by estimate.

    Args:
        labels: int (N,).
        probabilities: Out-of-sample, (N, classes).
        rows: The suspects, int (n,).
        joint: Of `label_errors.confident_joint`.

    Returns:
        {"wrong" among all labels, "wrong_found" among the suspects, "hours" of looking at these,
        "hours_all" of looking at all, "per_look": how many times as many wrong labels a look finds
        as a look at random}.
    """
    wrong = len(labels) - float(joint.trace())
    hit = min(float((1 - probabilities[rows, labels[rows]]).sum()), wrong)
    table = prices.seconds()
    hours = {n: prices.hours({"review": n}, table) for n in (len(rows), len(labels))}
    random = wrong / len(labels)
    return {
        "wrong": wrong,
        "wrong_found": hit,
        "hours": hours[len(rows)],
        "hours_all": hours[len(labels)],
        "per_look": hit / len(rows) / random if len(rows) and random else None,
    }


def planted(images: data.Data, rows: np.ndarray) -> dict[str, Any] | None:
    """Return how well suspects meet the labels that a recipe's noise spoiled: {"wrong",
    "precision", "recall"}; None where there is no such noise."""
    if images.truth is None:
        return None
    wrong = (images.truth != images.train.targets).numpy()
    hits = int(wrong[rows].sum())
    return {
        "wrong": int(wrong.sum()),
        "precision": hits / max(len(rows), 1),
        "recall": hits / max(int(wrong.sum()), 1),
    }


def _unseen(
    prepared: Prepared, folds: int, tracker: Tracker, say: Callable[[str], None]
) -> np.ndarray:
    """Return each training image's probabilities by a model that was trained without it, float64
    (N, classes)."""
    images, spec = prepared.images.train, prepared.job.arm.train
    spec = spec.model_copy(update={"target": None, "eval_every": 0})
    order, out = stratified(images.targets, prepared.seed), None
    for number in range(folds):
        say(f"fold {number + 1} of {folds}")
        away = order[number::folds].sort().values
        rest = torch.ones(len(images), dtype=torch.bool)
        rest[away] = False
        unseen = images.plain().take(away)
        with tempfile.TemporaryDirectory() as caches:
            short = Short(trained=True, caches=Path(caches))
            part = prepared.cut_short(short, spec, images.take(rest.nonzero().squeeze(1)), unseen)
            outcome = loop.run(part, tracker)
        with tracker.phase("eval"), outcome.live.served() as model:
            own = _probabilities(model, unseen, max(spec.batch_size, 256))
        out = np.zeros((len(images), own.shape[1])) if out is None else out
        out[away.numpy()] = own
    assert out is not None
    return out


def _probabilities(model: torch.nn.Module, images: data.ImageSet, size: int) -> np.ndarray:
    device = next(model.parameters()).device
    with in_mode(model, False), torch.inference_mode():
        parts = [
            logits_of(model(x.to(device))).double().softmax(1).cpu()
            for x, *_ in data.batches(images, size)
        ]
    return torch.cat(parts).numpy()


def _prepared(run: str | Path, arm: str | None, session: Session) -> Prepared:
    """Return the job of a run, or of an arm of its recipe, ready to be trained again."""
    recipe, arm, seed = _recipe(run, arm, session.runs)
    jobs = [j for j in session.plan(recipe) if j.recipe is recipe and j.arm.name == arm]
    return session.prepare(next((j for j in jobs if j.seed == seed), jobs[0]))


def _recipe(run: str | Path, arm: str | None, runs: Path) -> tuple[Recipe, str, int]:
    """Return a run's recipe, its arm and its seed."""
    text = str(run)
    if text.endswith((".yaml", ".yml")):
        recipe = load_recipe(text)
        return recipe, _known(recipe, arm or next(iter(recipe.arms))), recipe.train.seeds[0]
    folder = runs / text.removeprefix("run:") if text.startswith("run:") else Path(text)
    header: Mapping[str, Any] | None = next((r.header for r in record.readable([folder])), None)
    if header is None or not header.get("recipe"):
        raise BadInput(
            f"'{text}' holds no record of a recipe's run: give its folder, such as "
            "runs/RECIPE/ARM, run:RECIPE/ARM, or the recipe's file"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(str(header["recipe"]), encoding="utf-8")
        recipe = load_recipe(file)
    return recipe, _known(recipe, arm or str(header["arm"])), int(header["seed"])


def _known(recipe: Recipe, arm: str) -> str:
    if arm not in recipe.arms:
        raise BadInput(f"recipe {recipe.name} has no arm '{arm}'{nearest(arm, recipe.arms)}")
    return arm


def _write(
    prepared: Prepared, labels: np.ndarray, probabilities: np.ndarray, rows: np.ndarray,
    folder: Path, most: int,
) -> dict[str, str]:  # fmt: skip
    """Write the list and the contact sheet, and return their paths."""
    images, names = prepared.images.train, prepared.images.classes
    suggested = probabilities.argmax(1)
    list_path, sheet_path = folder / "suspects.csv", folder / "suspects.png"
    with (
        files.replacing(list_path) as target,
        Path(target).open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rank, row in enumerate(rows.tolist(), 1):
            both = labels[row], suggested[row]
            chances = [f"{probabilities[row, k]:.4f}" for k in both]
            writer.writerow(
                [rank, row, int(images.ids[row]), *(names[int(k)] for k in both), *chances]
            )
    shown = torch.from_numpy(rows[:most].copy())
    split = images.split.take(shown)
    said = tuple(f"{names[int(suggested[r])]}?" for r in shown.tolist())
    with files.replacing(sheet_path) as target:
        page = sheets.sheet(Split(split.images, split.labels, said), names, max(len(shown), 1))
        page.save(target, format="PNG")
    return {"csv": str(list_path), "sheet": str(sheet_path)}
