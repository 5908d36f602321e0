"""Settings of a structure that are searched by short trainings before the training proper
(`search:` of an arm): each of them is the arm's to pay."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from greenvis.core import files
from greenvis.core.installed import Installed
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import parts
from greenvis.experiment.evaluate import Evaluator
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import SearchSpec
from greenvis.experiment.run_folder import SEARCH_FILE
from greenvis.meters.track import Tracker

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared

Choices = Mapping[str, Sequence[int]]
Candidate = dict[str, int]


def drawn(choices: Choices, random: Random) -> Candidate:
    """Return a candidate at random, each value as likely as another."""
    return {name: random.choice(values) for name, values in choices.items()}


def child(
    choices: Choices, pool: Sequence[tuple[Candidate, float]], mutation: float, random: Random
) -> Candidate:
    """Return a candidate made of two good ones (RF-Next: Gao et al., 2023, global search).

    Two are drawn in proportion to their fitness (eq. 3), the segment between two anchors of one is
    put into the other, and each value is drawn anew with the probability `mutation`, from those
    there are: powers of two are as likely as each other, where the authors' code takes the one
    nearest to a uniform number, so mostly the largest.

    Args:
        choices: The values of each setting.
        pool: Candidates and their fitness, above 0.
        mutation: From 0 to 1.
        random: What draws.
    """
    fitness = [value for _, value in pool]
    first, second = (one for one, _ in random.choices(pool, fitness, k=2))
    names = [*choices]
    start, end = sorted((random.randint(0, len(names)), random.randint(0, len(names))))
    made = {**first, **{name: second[name] for name in names[start:end]}}
    return {
        name: random.choice(values) if random.random() < mutation else made[name]
        for name, values in choices.items()
    }


def proposed(
    spec: SearchSpec,
    choices: Choices,
    own: Candidate,
    past: Sequence[tuple[Candidate, float]],
    seed: int,
) -> Candidate:
    """Return the next candidate: first what the network has, then as `spec` says, none twice where
    there is another.

    Args:
        spec: How it is searched.
        choices: The values of each setting.
        own: What the network has.
        past: Those tried so far, with their fitness.
        seed: Of the search.
    """
    if not past:
        return own
    random = Random(f"{seed} {len(past)}")
    pool = sorted(past, key=lambda one: -one[1])[: spec.population]
    known = [candidate for candidate, _ in past]
    candidate = own
    for _ in range(100):
        if spec.method == "random" or len(past) < spec.population:
            candidate = drawn(choices, random)
        else:
            candidate = child(choices, pool, spec.mutation, random)
        if candidate not in known:
            break
    return candidate


def of_search(prepared: Prepared, spec: SearchSpec, tracker: Tracker) -> list[Part]:
    """Return one short training per trial, and the training proper of the best."""
    search = Search(prepared, spec, tracker)
    proper = parts.of_data(prepared, tracker)
    short = proper.spec.model_copy(update={"epochs": spec.epochs, "eval_every": 0, "target": None})

    def part(number: int) -> Part:
        own: dict[str, Any] = {"round": number + 1, "begin": lambda live: begin(number, live)}
        if number:
            own["techniques"] = None
        if number == spec.trials:
            return replace(proper, **own)
        own |= {"spec": short, "phase": f"search/trial{number + 1}"}
        judge = _Judge.of(proper.evaluator, lambda metric: search.note(number, metric))
        return replace(proper, **own, evaluator=judge)

    def begin(number: int, live: Wrapped) -> Part:
        search.begin(number, live)
        return every[number]

    every = [part(number) for number in range(spec.trials + 1)]
    return every


@dataclass(frozen=True, kw_only=True)
class _Judge(Evaluator):
    """Says how good a trial is on the images held out; the test is not looked at."""

    note: Callable[[float], None]

    @classmethod
    def of(cls, judge: Evaluator, note: Callable[[float], None]) -> _Judge:
        own = {f.name: getattr(judge, f.name) for f in fields(Evaluator)}
        return cls(**{**own, "test": judge.held_out}, note=note)

    def on_test(self, live: Wrapped, accelerator: Accelerator | None = None) -> dict[str, float]:
        metrics = super().on_test(live, accelerator)
        self.note(metrics[self.task.primary.name])
        return {f"held_out_{name}": value for name, value in metrics.items()}


class Search:
    """The trials of a job. Their file lies beside the record: what was tried once is not tried
    again.

    Args:
        prepared: The job.
        spec: Of its arm.
        tracker: Records the trials.

    Attributes:
        trials: [candidate, metric on the images held out] of each so far; a metric of None where
            the trial is under way.
    """

    def __init__(self, prepared: Prepared, spec: SearchSpec, tracker: Tracker) -> None:
        self.prepared, self.spec, self.tracker = prepared, spec, tracker
        job = prepared.job
        self.file = None if prepared.short else job.folder / f"{job.inputs}-{SEARCH_FILE}"
        self.trials: list[list[Any]] = []
        if self.file is not None and self.file.exists():
            self.trials = _read(self.file)
        self._first: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def begin(self, number: int, live: Wrapped) -> None:
        """Give the model its first weights back, and the structure of a trial, or behind the last
        that of the best."""
        searched = check(live)
        if self._first is None:
            self._first = _copied(live.model.state_dict()), _copied(live.state_dict())
        else:
            live.model.load_state_dict(self._first[0])
            live.load_state_dict(self._first[1])
        if number == self.spec.trials:
            best = max(self._fit, key=lambda one: one[1])[0]
            searched.choose(best, trial=False)
            facts = {**self.spec.model_dump(), "trials": self.trials, "chosen": best}
            self.tracker.fact(search=facts)
            return
        if number == len(self.trials):
            choices, seed = searched.choices(), self.prepared.seed
            own = {name: searched.chosen()[name] for name in choices}
            self.trials.append([proposed(self.spec, choices, own, self._fit, seed), None])
            self._write()
        searched.choose(self.trials[number][0], trial=True)

    @property
    def _fit(self) -> list[tuple[Candidate, float]]:
        """The candidates with their fitness, above 0 and more where better."""
        more = self.prepared.task.primary.higher_is_better
        return [
            (candidate, max(1e-9, metric) if more else 1 / max(1e-9, metric))
            for candidate, metric in self.trials
            if metric is not None
        ]

    def note(self, number: int, metric: float) -> None:
        """Note what a trial reached."""
        self.trials[number][1] = metric
        self._write()

    def _write(self) -> None:
        if self.file is not None:
            files.write(self.file, json.dumps({"trials": self.trials}) + "\n")


def check(live: Wrapped) -> Installed:
    """Return the technique whose settings are searched. Raises BadInput where none has any."""
    using = live.using("choices")
    if not using:
        raise BadInput(
            "search chooses settings of a structure, and no technique of this arm has any to "
            "choose: name one that has, as rfnext"
        )
    return using[0][1]


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _read(file: Path) -> list[list[Any]]:
    try:
        trials = files.read_json(file, "list of trials")["trials"]
        for candidate, metric in trials:
            numbers = all(type(value) is int for value in candidate.values())
            known = metric is None or (isinstance(metric, (int, float)) and math.isfinite(metric))
            if not numbers or not known:
                raise ValueError("it holds something else")
    except (BadInput, KeyError, TypeError, ValueError, AttributeError) as error:
        raise GreenvisError(
            f"{file} cannot be read ({error}); remove it to start this arm again"
        ) from error
    return trials
