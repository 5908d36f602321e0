"""Active learning: labels bought in rounds, of images that a query chooses, and a training after
each (`active:` of an arm)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from greenvis import data, models
from greenvis.core import files
from greenvis.core.wrap import Wrapped
from greenvis.data.queries import QUERIES, Candidates, select
from greenvis.data.transforms import mix
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import parts, roles
from greenvis.experiment.answers import answers
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import ActiveSpec
from greenvis.experiment.run_folder import ROUNDS_FILE, WEIGHTS_FILE
from greenvis.meters.track import Tracker

if TYPE_CHECKING:
    from greenvis.experiment.prepare import Prepared

BATCH = 256  # images that are looked at together


def of_active(prepared: Prepared, spec: ActiveSpec, tracker: Tracker) -> list[Part]:
    """Return one training per round, each of which buys its labels as it begins."""
    purchases = Purchases(prepared, spec, tracker)
    # nobody can learn from what a part is before it begins: it has no label
    waiting = parts.of_images(prepared, prepared.images.train.unlabeled(), tracker)

    def part(number: int) -> Part:
        own: dict[str, Any] = {
            "phase": f"train/round{number + 1}",
            "techniques": prepared.techniques if number == 0 else None,
            "restart": spec.retrain == "scratch",
            "round": number + 1,
            "count": lambda live: roles.count(prepared, live, tracker),
        }

        def begin(live: Wrapped) -> Part:
            images = purchases.buy(number, live)
            return replace(parts.of_images(prepared, images, tracker), **own)

        return replace(waiting, **own, begin=begin)

    return [part(number) for number in range(spec.rounds)]


class Purchases:
    """Which labels a job has bought, round by round. Its file lies beside the record: what was
    bought once is not chosen again.

    Args:
        prepared: The job; its training images are the pool.
        spec: Of its arm.
        tracker: Records labels, and what it took to choose.

    Attributes:
        rounds: Positions in the pool, in order of choice, of each round so far.
    """

    def __init__(self, prepared: Prepared, spec: ActiveSpec, tracker: Tracker) -> None:
        self.prepared, self.spec, self.tracker = prepared, spec, tracker
        self.pool = prepared.images.train
        self.file = (
            None if prepared.short else prepared.job.folder / f"{prepared.job.inputs}-{ROUNDS_FILE}"
        )
        self.rounds: list[list[int]] = []
        if self.file is not None and self.file.exists():
            self.rounds = self._read(self.file)

    def buy(self, number: int, live: Wrapped) -> data.ImageSet:
        """Buy the labels of a round, and return all images that have one, with their labels.

        Args:
            number: Of the round, from 0.
            live: The model as the round before left it.
        """
        counts = self.spec.counts()
        if number >= len(self.rounds):
            with self.tracker.phase(f"train/round{number + 1}/query"):
                count = counts[number] - (counts[number - 1] if number else 0)
                self.rounds.append(self._choose(number, live, count).tolist())
            if self.file is not None:
                files.write(self.file, json.dumps({"rounds": self.rounds}) + "\n")
        bought = self.rounds[number]
        kind = self.pool.label_kind or self.pool.split.kind
        self.tracker.labels(kind, len(bought), why="bought", name=f"round {number + 1}")
        self.tracker.images("labelled", counts[number])
        if self.spec.query != "random":  # looked at, whoever is labelled in the end
            self.tracker.images("unlabelled", len(self.pool) - counts[-1])
        facts = {**self.prepared.images.facts(), "train": counts[number]}
        self.tracker.fact(data={**facts, "chosen_from": len(self.pool)})
        rows = [row for own in self.rounds[: number + 1] for row in own]
        return self.pool.take(torch.tensor(rows).sort().values)

    def _choose(self, number: int, live: Wrapped, count: int) -> Tensor:
        """Return the positions of a round's images."""
        query, seed = self.spec.query, self.prepared.seed
        needs = QUERIES[query]
        labelled = torch.zeros(len(self.pool), dtype=torch.bool)
        labelled[[row for own in self.rounds for row in own]] = True
        if number == 0 and self.spec.features is None:
            query = "random"  # no model was trained yet
        if query == "random":
            return select("random", Candidates(labelled), count, seed)
        probabilities, features = None, None
        if self.spec.features is not None:
            features = self._features
        else:
            with live.served() as model:
                own = answers(model, self._shown(), self.prepared.task, needs.features)
            probabilities, features = own.probabilities, own.features
        drawn = int(mix(np.array([number]), seed)[0] >> np.uint64(1))
        return select(query, Candidates(labelled, probabilities, features), count, drawn)

    @cached_property
    def _features(self) -> Tensor:
        """Of the model that `features` names, (n, dim)."""
        used = self.prepared.job.uses[self.spec.features or ""]
        file = f"file:{(used.folder / WEIGHTS_FILE).resolve()}"
        model = models.build(file, trust=self.prepared.trust, folder=used.recipe.folder)
        features = answers(model, self._shown(), self.prepared.task, features=True).features
        assert features is not None
        return features

    def _shown(self) -> Any:
        """Return the pool's images in batches, without their labels."""
        loader = data.batches(self.pool.plain().unlabeled(), BATCH)
        return self.tracker.steps(loader, phase=None, progress=False)

    def _read(self, file: Path) -> list[list[int]]:
        try:
            rounds = files.read_json(file, "list of labels bought")["rounds"]
            every = [row for own in rounds for row in own]
            sizes = [len(own) for own in rounds]
            counts = self.spec.counts()
            wanted = [counts[0], *[self.spec.step] * (len(counts) - 1)]
            valid = all(type(row) is int and 0 <= row < len(self.pool) for row in every)
            if not valid or len(set(every)) < len(every) or sizes != wanted[: len(sizes)]:
                raise ValueError("it holds something else")
        except (BadInput, KeyError, TypeError, ValueError) as error:
            raise GreenvisError(
                f"{file} cannot be read ({error}); remove it to start this arm again"
            ) from error
        return rounds
