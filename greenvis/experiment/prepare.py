"""One job made ready: its images, stream, model and techniques, made in one place for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from greenvis import data, models
from greenvis.core import distributed
from greenvis.core.technique import Technique
from greenvis.core.weights import load_state
from greenvis.core.wrap import Wrapped
from greenvis.data import streams, subsets
from greenvis.errors import BadInput, some
from greenvis.experiment import parts, rounds, search, synthesis
from greenvis.experiment.job_data import model_options
from greenvis.experiment.jobs import Job, located, placed
from greenvis.experiment.layers import Layers
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import Arm, TrainSpec
from greenvis.experiment.run_folder import BOUNDARY, CHECKPOINT_FILE, SUBSET_FILE, WEIGHTS_FILE
from greenvis.meters import record
from greenvis.meters.track import Tracker, track
from greenvis.models import averaging
from greenvis.models.folding import folded
from greenvis.tasks.base import Task


@dataclass(frozen=True)
class Short:
    """A training cut short, to see what the whole takes: no checkpoint, and no neighbours asked.

    Args:
        trained: whether the runs it builds on are there, to take their weights.
        batches: of an epoch; None: all.
        tests: batches of an evaluation; None: all.
        caches: folder of the outputs of frozen parts; None: none are kept.
    """

    trained: bool = False
    batches: int | None = None
    tests: int | None = None
    caches: Path | None = None

    def take(self, loader: Iterable[Any], most: int | None) -> Iterable[Any]:
        """Return the first `most` batches of a loader, read; the loader where that is None."""
        return loader if most is None else list(islice(loader, most))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a job trains on and with. `run`, `plan`, `advise`, stages and workers take it from here.

    Args:
        job: what is to be done; a stage's job has the stage's arm.
        images: the recipe's data.
        runs: folder of the records of all recipes.
        trust: whether references may import code.
        command: the words of the command, for the record.
        prepare: makes the jobs ready that this one builds on.
        short: how it is cut short; None: it is not.
    """

    job: Job
    images: data.Data
    runs: Path
    trust: bool
    command: Sequence[str]
    prepare: Callable[[Job], Prepared]
    short: Short | None = None

    @property
    def seed(self) -> int:
        """Of all that is drawn at random."""
        return self.job.seed

    @property
    def checkpoint(self) -> Path | None:
        """The file it goes on from; None where it is cut short."""
        return self._beside(CHECKPOINT_FILE)

    @property
    def boundary(self) -> Path | None:
        """The file of what its stages that are over left; None where it is cut short."""
        return self._beside(BOUNDARY)

    def _beside(self, name: str) -> Path | None:
        return None if self.short else self.job.folder / f"{self.job.inputs}-{name}"

    @cached_property
    def stages(self) -> list[Prepared]:
        """One for each stage of the arm, with its own `train` and techniques; none without."""
        return [replace(self, job=replace(self.job, arm=stage)) for stage in self.job.arm.stages]

    @cached_property
    def task(self) -> Task:
        """What the model answers, with `train.label_smoothing` where that is set.

        Raises:
            BadInput: for label smoothing of a task that has none.
        """
        task, train = self.job.arm.task, self.job.arm.train
        if not (smoothing := train.label_smoothing):
            return task
        if "label_smoothing" not in type(task).model_fields:
            raise BadInput(f"train.label_smoothing is of classes, and task '{task.name}' has none")
        return task.model_copy(update={"label_smoothing": smoothing})

    @cached_property
    def stream(self) -> streams.Stream | None:
        """The stream of experiences the job trains on; None where its data is no stream.

        Raises:
            BadInput: for settings that no stream has.
        """
        spec = self.job.arm.stream
        if spec is None:
            return None
        if self.job.arm.train.target is not None:
            raise BadInput(
                "train.target ends one training; a stream of tasks has no such end: leave it out"
            )
        stream = streams.make(
            self.images, seed=self.job.seed, **spec.model_dump(exclude={"restart"})
        )
        if stream.head != "single" and self.job.arm.train.label_smoothing:
            raise BadInput(
                f"train.label_smoothing gives a share to classes which a {stream.head} head hides; "
                "leave it out"
            )
        return stream

    @property
    def trained(self) -> bool:
        """Whether the runs it builds on are there."""
        return self.short is None or self.short.trained

    def build(self, weights: bool | None = None) -> nn.Module:
        """Build the arm's model, from its own random state.

        Args:
            weights: whether to load what `init` names; None: where that is there.
        """
        job, weights = self.job, self.trained if weights is None else weights
        spec, images = job.arm.model, self.images
        used = [job.uses[ref] for ref in spec.starts if ref in job.uses]
        if used and used[0].arm.task.form == "image_text" and images.words is None:
            images = replace(images, words=self.prepare(used[0]).images.words)  # it reads the same
        options = model_options(job, images)
        torch.manual_seed(job.seed)
        where = (
            job.recipe.where("arms", job.arm.name, "model")
            if job.recipe.arms[job.arm.name].model
            else job.recipe.where("model", "ref")
        )
        model = located(
            where, models.build, spec.ref, trust=self.trust, folder=job.recipe.folder, **options
        )
        if spec.starts and (weights or not used):
            located(where, self._load, model)
        models.describe(model, **images.inputs)  # what it is shown from here on
        return model

    def _load(self, model: nn.Module) -> None:
        """Load the weights that the arm's model begins with."""
        job, spec = self.job, self.job.arm.model
        paths = [
            job.uses[ref].folder / WEIGHTS_FILE
            if ref in job.uses
            else models.file_of(ref, job.recipe.folder)
            for ref in spec.starts
        ]
        head = "match" if spec.classifier == "keep" else "replace"
        if spec.init is not None:
            models.load_weights(model, paths[0], head=head)
            return
        state, source = averaging.read(paths), f"the mean of {some(map(str, paths))}"
        load_state(model, state, head=head, source=source)
        if spec.average_norms == "estimate":
            images = data.batches(self.images.train, max(256, job.arm.train.batch_size))
            update_bn(images, model)

    def techniques(self, trained: bool | None = None) -> list[Technique]:
        """Return what the model is wrapped with, layers to freeze first; see `resolved`."""
        layers = [Layers(of=self.job.arm.layers)] if self.job.arm.layers else []
        return [*layers, *(self.resolved(t, trained) for t in self.job.arm.techniques)]

    def resolved(self, technique: Technique, trained: bool | None = None) -> Technique:
        """Put the model a job left in the place of each "run:NAME".

        Args:
            technique: As the recipe has it.
            trained: False puts an untrained model like it there, before that job has run; None:
                where that has.
        """
        trained, sources = self.trained if trained is None else trained, {}
        for field, ref in technique.runs().items():
            used = self.job.uses[ref]
            file = f"file:{(used.folder / WEIGHTS_FILE).resolve()}"
            sources[field] = (
                models.build(file, trust=self.trust, folder=used.recipe.folder)
                if trained
                else self.prepare(used).build(weights=False)
            )
        request = placed(technique, self.job.recipe.folder).with_runs(sources)
        shape = self.images.test.shape
        return request.for_images(shape).for_classes(tuple(self.images.classes))

    def cut_short(
        self,
        short: Short,
        spec: TrainSpec,
        train: data.ImageSet,
        test: data.ImageSet,
        unlabeled: data.ImageSet | None = None,
        stages: Sequence[Arm] = (),
    ) -> Prepared:
        """Return the training by `spec` of the arm's model and techniques alone, on other images.

        Args:
            short: how it is cut short.
            spec: how it trains.
            train: what it trains on.
            test: what it is tested on.
            unlabeled: images without a label; None: the job's.
            stages: in which it trains.
        """
        update = {"train": spec, "stream": None, "subset": None, "active": None}
        update |= {"synthesis": None, "search": None, "stages": tuple(stages), "stage": ""}
        job = replace(self.job, arm=self.job.arm.model_copy(update=update))
        beside = self.images.unlabeled if unlabeled is None else unlabeled
        images = replace(self.images, train=train, test=test, unlabeled=beside)
        return replace(self, job=job, images=images, short=short)

    def parts(self, tracker: Tracker) -> list[Part]:
        """Return what the training is made of; see `loop.run`."""
        if self.stages:
            return [parts.of_data(stage, tracker) for stage in self.stages]
        if self.stream is not None:
            return parts.of_stream(self, self.stream, tracker)
        if self.job.arm.active is not None:
            return rounds.of_active(self, self.job.arm.active, tracker)
        if self.job.arm.search is not None:
            return search.of_search(self, self.job.arm.search, tracker)
        return [parts.of_data(self, tracker)]

    def training(self, tracker: Tracker) -> data.ImageSet:
        """Return the images the job trains on; a subset, or images of scarce classes, are chosen or
        made in a phase of their own, and their file lies beside the record."""
        spec, images = self.job.arm.subset, self.images
        if self.job.arm.synthesis is not None:
            return synthesis.add(self, self.job.arm.synthesis, tracker)
        if spec is None:
            return images.train
        with tracker.phase("subset"):
            make = partial(
                subsets.make,
                images.train,
                seed=self.job.seed,
                file=self.job.folder / f"{self.job.inputs}-{SUBSET_FILE}",
                count=tracker.flops,
                **spec.model_dump(),
            )
            subset = distributed.main_first(make)  # the others read the file of the first
        tracker.fact(
            data={
                **images.facts(),
                "train": len(subset),
                "subset": spec.model_dump(),
                "chosen_from": len(images.train),
            }
        )
        return subset

    def tracker(self, folder: Path, codecarbon: bool = False) -> Tracker:
        """Return the meter of the job, which puts its record below `folder`."""
        job, meter = self.job, self.job.recipe.meter

        def attempts() -> int:
            return len(list(job.folder.glob("*.rank0" + record.SUFFIX)))

        header = {
            "name": job.recipe.name,
            "arm": job.arm.name,
            "seed": job.seed,
            "inputs": job.inputs,
            "attempt": distributed.on_main(attempts) + 1,
            "baseline": job.recipe.baseline,
            "recipe": job.recipe.text(),
            "command": list(self.command),
        }
        return track(
            job.recipe.name,
            dir=folder,
            country=meter.country,
            intensity=meter.intensity,
            pue=meter.pue,
            codecarbon=codecarbon,
            header=header,
            quiet=True,
        )

    @contextmanager
    def served(self, live: Wrapped) -> Iterator[nn.Module]:
        """Hold the model within as it will be served: merged where that is possible, its norms
        folded where that is wanted."""
        model = live.for_inference()
        x = next(iter(data.batches(self.images.test, 2)))[0]
        with (
            live.served(),
            folded(model, x.to(next(model.parameters()).device))
            if self.job.arm.model.fold_norms
            else nullcontext(),
        ):
            yield model
