"""Which settings of a recipe's training cost less on this machine, measured on a few steps before
anything is spent."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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

PRESENT, AGAIN = "as it is", "as it is, again"
SETTINGS: dict[str, tuple[str, ...]] = {
    "channels last": ("model.memory_format=channels_last",),
    "bf16": ("train.precision=bf16",),
    "one thread": ("train.threads=1",),
}
ROUNDS = 3
DEAR = 1.25  # times the energy as it is, in the first round: measured no further
SLOW_BF16 = "this processor has no instructions for bf16: emulated, it takes many times the energy"


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

    Settings are how weights lie in memory (channels last), bf16, and one thread; those that take
    less are measured together, too. None changes what is learned but bf16, which rounds: look at
    its accuracy in a run. Optimizers are fused in each.

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
        that bring it about}] by ratio, "refused": {setting: why it was not measured, or no
        further}, "pick": the setting to take, None where none takes less in each round and in the
        median by more than "floor", how many times the recipe as it is reads apart from itself
        within a round, "tuning_j": what measuring took}.

    Raises:
        BadInput: Where the recipe cannot be used.
        GreenvisError: Where no energy is known on this machine.
    """
    distributed.require_single_process("greenvis tune")
    if rounds < 1:
        raise BadInput(f"rounds is {rounds}: give 1 or more")
    with tempfile.TemporaryDirectory() as folder, track("tune", dir=folder, quiet=True) as own:

        def one(settings: Sequence[str]) -> _Setting:
            # a session each: it knows one job of each name and seed, whatever the overrides
            session = Session(Path(runs), trust, ("greenvis", "tune", str(recipe)), say)
            read = load_recipe(recipe, [*overrides, *settings])
            return session, next(j for j in session.plan(read) if j.arm.name == read.baseline)

        present = one(())
        alone, refused = _alone(one, present)
        measured, dear = _measured({PRESENT: present, **alone, AGAIN: present}, rounds, say)
        again = _row(AGAIN, (), measured, measured[PRESENT])
        floor = max(again["high"], 1 / again["low"])
        rows = [_row(PRESENT, (), measured, measured[PRESENT])]
        rows += [_row(a, SETTINGS[a], measured, measured[PRESENT]) for a in alone if a not in dear]
        less = [row for row in rows if _saves(row, floor)]
        if len(less) > 1:
            name = ", ".join(row["setting"] for row in less)
            settings = [text for row in less for text in row["set"]]
            together, more = _measured({PRESENT: present, name: one(settings)}, rounds, say)
            dear |= more
            if name not in dear:
                rows.append(_row(name, settings, together, together[PRESENT]))
        spent = pricing.reading(own.energy())
    rows.sort(key=lambda row: row["ratio"])
    return {
        "rows": rows, "refused": refused | dear, "arm": present[1].arm.name, "rounds": rounds,
        "pick": next((row["setting"] for row in rows if _saves(row, floor)), None),
        "floor": floor, "tuning_j": spent["value"],
    }  # fmt: skip


def _saves(row: Mapping[str, Any], floor: float) -> bool:
    """Return whether a setting takes less in each round, and by more than noise in the median."""
    return row["high"] < 1 and row["ratio"] < 1 / floor


_Setting = tuple[Session, Job]


def _alone(
    one: Callable[[Sequence[str]], _Setting], present: _Setting
) -> tuple[dict[str, _Setting], dict[str, str]]:
    """Return the baseline's job in each setting that suits it, and why the others do not."""
    settings: dict[str, _Setting] = {}
    refused: dict[str, str] = {}
    for name, overrides in SETTINGS.items():
        try:
            setting = one(overrides)
        except BadInput as error:
            refused[name] = str(error)
            continue
        if setting[1].arm == present[1].arm:
            refused[name] = "the recipe has it"
        elif name == "bf16" and not _has_bf16():
            refused[name] = SLOW_BF16
        else:
            settings[name] = setting
    return settings, refused


def _has_bf16() -> bool:
    """Return whether a GPU trains here, or the processor has bf16."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _measured(
    settings: Mapping[str, _Setting], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the joules of each setting's training, one a round, in turns; and those that were
    left out after the first, with the reason."""
    measured: dict[str, list[float]] = {}
    dear: dict[str, str] = {}
    for i in range(rounds):
        for name in in_turn(settings, i):
            if name in dear:
                continue
            say(f"round {i + 1} of {rounds}: {name}")
            session, job = settings[name]
            with threads(job.arm.train.threads):
                joules = expected(session.prepare(job))
            if joules is None:
                raise GreenvisError(
                    "no energy is known on this machine: see `greenvis doctor` for its meters"
                )
            measured.setdefault(name, []).append(joules)
        for name, joules in measured.items():
            if i == 0 and name != AGAIN and joules[0] > DEAR * measured[PRESENT][0]:
                dear[name] = f"×{joules[0] / measured[PRESENT][0]:.2f} in the first round"
    return measured, dear


def _row(
    name: str,
    settings: Sequence[str],
    measured: Mapping[str, Sequence[float]],
    present: Sequence[float],
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(measured[name], present, strict=True)]
    return {
        "setting": name,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "energy_j": statistics.median(measured[name]),
        "set": [*settings],
    }
