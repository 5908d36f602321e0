"""Which settings of a recipe's training cost less on this machine, measured on a few steps before
anything is spent."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from greenvis.core import distributed
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment.jobs import Job
from greenvis.experiment.optim import threads
from greenvis.experiment.recipe import load_recipe
from greenvis.experiment.session import Session
from greenvis.meters import pricing
from greenvis.meters.speed import in_turn
from greenvis.meters.track import track
from greenvis.planning.plan import expected

PRESENT = "as it is"
SETTINGS: dict[str, tuple[str, ...]] = {
    PRESENT: (),
    "channels last": ("model.memory_format=channels_last",),
    "bf16": ("train.precision=bf16",),
    "one thread": ("train.threads=1",),
    "channels last, bf16": ("model.memory_format=channels_last", "train.precision=bf16"),
}
ROUNDS = 3


def tune(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    rounds: int = ROUNDS,
    runs: str | Path = "runs",
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure the training of a recipe's baseline in several settings of the machine, in turns, and
    say which to take.

    Settings are how weights lie in memory (channels last), bf16, and one thread. None changes what
    is learned but bf16, which rounds: look at its accuracy in a run.

    Args:
        recipe: A recipe's file.
        overrides: Of the recipe ("train.epochs=3").
        rounds: In which settings take turns.
        runs: Folder of run records.
        trust: Allow models given as package.module:function, which runs their code.
        say: Told how the work goes on.

    Returns:
        {"rows": [{"setting", "ratio", "low", "high": of its energy to that as it is, the median,
        least and greatest of the rounds', "energy_j": of the whole training, "set": the overrides
        that bring it about}] by ratio, "refused": {setting: reason}, "pick": the setting to take,
        None where none takes less in each round, "tuning_j": what measuring took}.

    Raises:
        BadInput: Where the recipe cannot be used.
        GreenvisError: Where no energy is known on this machine.
    """
    distributed.require_single_process("greenvis tune")
    if rounds < 1:
        raise BadInput(f"rounds is {rounds}: give 1 or more")
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, track("tune", dir=folder, quiet=True) as own:
        session = Session(Path(runs), trust, ("greenvis", "tune", str(recipe)), say)
        jobs, refused = _jobs(session, recipe, overrides)
        for i in range(rounds):
            for name in in_turn(jobs, i):
                say(f"round {i + 1} of {rounds}: {name}")
                with threads(jobs[name].arm.train.threads):
                    joules = expected(session.prepare(jobs[name]))
                if joules is None:
                    raise GreenvisError(
                        "no energy is known on this machine: see `greenvis doctor` for its meters"
                    )
                measured.setdefault(name, []).append(joules)
        spent = pricing.reading(own.energy())
    rows = sorted((_row(name, measured) for name in measured), key=lambda row: row["ratio"])
    best = next((row for row in rows if row["high"] < 1), None)
    return {
        "rows": rows,
        "refused": refused,
        "pick": None if best is None else best["setting"],
        "arm": jobs[PRESENT].arm.name,
        "rounds": rounds,
        "tuning_j": spent["value"],
    }


def _jobs(
    session: Session, recipe: str | Path, overrides: Sequence[str]
) -> tuple[dict[str, Job], dict[str, str]]:
    """Return the baseline's job in each setting that suits it, and why the others do not."""
    jobs: dict[str, Job] = {}
    refused: dict[str, str] = {}
    for name, settings in SETTINGS.items():
        one = load_recipe(recipe, [*overrides, *settings])
        try:
            jobs[name] = next(j for j in session.plan(one) if j.arm.name == one.baseline)
        except BadInput as error:
            if name == PRESENT:
                raise
            refused[name] = str(error)
    return jobs, refused


def _row(name: str, measured: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(measured[name], measured[PRESENT], strict=True)]
    return {
        "setting": name,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "energy_j": statistics.median(measured[name]),
        "set": [*SETTINGS[name]],
    }
