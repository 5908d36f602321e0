"""Short runs of many plans on a few of the training images, each a metered run by its whole
schedule; half go on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greenvis import data
from greenvis.data.splits import stratified
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.jobs import Job
from greenvis.experiment.optim import threads
from greenvis.experiment.prepare import Prepared, Short
from greenvis.experiment.recipe import TrainSpec
from greenvis.experiment.serving import served
from greenvis.experiment.session import Session
from greenvis.meters import pricing, record, serving
from greenvis.meters.measure import serve
from greenvis.planning import extrapolate
from greenvis.planning.plan import expected
from greenvis.report.formatting import plural, si
from greenvis.report.stats import pareto
from greenvis.tasks.base import Measure, Task

# of the training images, in the longest trial; of a budget of labels, half, for they are few
SHARE, SHARE_OF_FEW = 0.25, 0.5
MOST = 2000  # images of the longest trial
LEAST = 2  # images a class in the shortest
FEW = 8  # images in the shortest, where labels are no classes
HELD = 500  # training images that no trial trains on, at most: their labels say how good it is
BATCH = 64  # images at once where serving is measured, as a finished run measures it


@dataclass(frozen=True)
class Trial:
    """One short run. images: it trained on. first_j, later_j: of its first epoch and the others;
    total_j: of all of it.

    plain: whether it serves the model's own structure, so that all such plans cost the same to
    serve. served_j: one image's, None where it was not read.
    """

    images: int
    metric: float  # the primary one of the task
    first_j: float
    later_j: float
    total_j: float
    plain: bool
    served_j: float | None = None


class Trials:
    """The trials of all plans of one question. held: images each is tested on; images: how many the
    whole training has.

    Three sizes, each twice the one before; the largest is `share` of the training images (None:
    `SHARE`, where few `SHARE_OF_FEW`), and at most `MOST`. few: labels are a budget, of which a
    class need have but one; sizes that have less are left out, as long as two remain. Images
    without a label are shared out as those with one are. Trials on record with the same inputs are
    kept unless `fresh`. Raises BadInput for too few images.
    """

    def __init__(
        self,
        session: Session,
        jobs: Mapping[str, Job],
        *,
        share: float | None = None,
        few: bool = False,
        fresh: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.session, self.jobs, self.fresh, self.say = session, jobs, fresh, say
        share = share or (SHARE_OF_FEW if few else SHARE)
        first = session.prepare(next(iter(jobs.values())))
        self.task: Task = first.task
        extrapolate.check(self.task.primary)
        self._train = first.images.train
        self.images = len(self._train)
        beside = [session.prepare(job).images.unlabeled for job in jobs.values()]
        self.unlabeled = max((len(images) for images in beside if images is not None), default=0)
        longest = min(int(share * self.images), MOST)
        self.sizes: tuple[int, ...] = (longest // 4, longest // 2, longest)
        order = self._drawn(len(first.images.classes), share, few)
        self._order = order
        self.held = self._train.plain().take(order[longest:][-HELD:])
        self.results: dict[str, list[Trial]] = {name: [] for name in jobs}
        self.failed: dict[str, str] = {}
        self._plain_j: float | None = None  # to serve one image by the model's own structure

    def _drawn(self, classes: int, share: float, few: bool) -> Tensor:
        """Return the order in which trials take images, so that each has classes in proportion.
        Raises BadInput for too few images, or one without a label."""
        split, name = self._train.split, plural(self.task.unit)
        of_classes = split.kind == "class" and self.task.form in ("classification", "bags")
        each = 1 if few else LEAST
        least = each * classes if of_classes else FEW
        if few and self.sizes[1] >= least:
            self.sizes = tuple(size for size in self.sizes if size >= least)
        if self.sizes[0] < least:
            of = f" of {classes} classes" if of_classes else ""
            needed = f"{each} a class" if of_classes else str(FEW)
            raise BadInput(
                f"{self.images} training {name}{of} are too few to try plans on a share of "
                f"{share:g}: the shortest trial would have {self.sizes[0]} {name}, and {needed} "
                f"are needed; give more {name} or share"
            )
        if unknown := int((~split.known).sum()):
            raise BadInput(
                f"a trial of plans needs the label of every training image, and that of {unknown} "
                "is not known: leave those out, or leave out data.labels"
            )
        return stratified(split.groups, self._train.transform.seed)

    def run(self, images: float) -> None:
        """Try every plan on each size but the largest, and at least half of them on that, too:
        those ahead on the metric against energy.

        (Successive halving: Jamieson and Talwalkar, 2016.) images: to be served. A plan whose
        training fails goes to `failed`.
        """
        for number, size in enumerate(self.sizes):
            names = list(self.results) if number < len(self.sizes) - 1 else self._ahead(images)
            for name in names:
                try:
                    serving = number >= len(self.sizes) - 2
                    trial = self._trial(self.jobs[name], size, serving)
                    self.results[name].append(trial)
                    if trial.plain and self._plain_j is None:
                        self._plain_j = trial.served_j
                except GreenvisError as error:
                    self.failed[name] = str(error)
            self.results = {
                name: trials for name, trials in self.results.items() if name not in self.failed
            }
        if not self.results:
            raise GreenvisError(f"no plan could be trained: {next(iter(self.failed.values()))}")

    def expected_j(self) -> float | None:
        """Return the joules that `run` is expected to take, if each plan costs what the first that
        was not tried before does, by a few of its steps; None where no energy is known here."""
        untried: list[tuple[Job, int]] = []
        for number, size in enumerate(self.sizes):
            left = [
                job for job in self.jobs.values() if self.fresh or not self._on_record(job, size)
            ]
            if number == len(self.sizes) - 1:  # half of them are tried on the most images
                left = left[: max(0, len(left) - len(self.jobs) // 2)]
            untried += [(job, size) for job in left]
        if not untried:
            return 0.0
        job = untried[0][0]
        try:
            with threads(job.arm.train.threads):
                joules = expected(self.session.prepare(job))
        except GreenvisError:  # its trial says so
            return None
        return joules and joules * math.fsum(size for _, size in untried) / self.images

    def announce(self) -> float | None:
        """Say what the trials will take, and return it as `expected_j`."""
        joules, units = self.expected_j(), plural(self.task.unit)
        if joules is None:
            cost = "energy not known beforehand"
        elif joules == 0:
            cost = "all tried before, nothing to spend"
        else:
            cost = f"about {si(joules, 'J')}, if each costs what {next(iter(self.jobs))} does"
            if self.unlabeled:
                cost += "; plans that learn from images without a label cost several times that"
        sizes = ", ".join(str(size) for size in self.sizes)
        self.say(f"{len(self.jobs)} plans to try on {sizes} {units}: {cost}")
        return joules

    def served_j(self, name: str) -> float:
        """Return the joules of one image a plan serves: its own last reading, or that of another
        plan with the same model."""
        own = [t.served_j for t in self.results[name] if t.served_j is not None]
        joules = self._plain_j if self.results[name][-1].plain else own[-1]
        assert joules is not None
        return joules

    def predicted(self, name: str, images: float) -> dict[str, extrapolate.Figure]:
        """Return {"metric", "train_energy_j", "serve_energy_j", "total_energy_j"} of a plan's
        whole training.

        serve_energy_j: of 1,000 images; total: of training and `images` served.
        """
        trials = self.results[name]
        metric = extrapolate.metric(
            [(t.images, t.metric) for t in trials], self.images, len(self.held), self.task.primary
        )
        training = extrapolate.energy(
            [(t.images, t.first_j, t.later_j) for t in trials], self.images
        )
        served = extrapolate.banded(self.served_j(name))
        total = {bound: training[bound] + images * served[bound] for bound in training}
        return {
            "metric": metric,
            "train_energy_j": training,
            "serve_energy_j": {bound: 1000 * value for bound, value in served.items()},
            "total_energy_j": total,
        }

    def _ahead(self, images: float) -> list[str]:
        """Return the plans no other beats on predicted accuracy and energy, then those only such
        beat, … until half are."""
        forecasts = {name: self.predicted(name, images) for name in self.results}
        left = points(forecasts, self.task.primary)
        ahead: list[str] = []
        while len(ahead) < math.ceil(len(forecasts) / 2):
            ahead += (front := pareto(left))
            left = {name: at for name, at in left.items() if name not in front}
        return ahead

    def _trial(self, job: Job, size: int, serving: bool) -> Trial:
        before = None if self.fresh else self._on_record(job, size)
        if before is not None and (
            before.served_j is not None
            or not serving
            or (before.plain and self._plain_j is not None)
        ):
            self.say(f"{job.arm.name}: {size} images, tried before")
            return before
        self.say(f"{job.arm.name}: {size} images")
        with threads(job.arm.train.threads), tempfile.TemporaryDirectory() as folder:
            path = self._run(self.session.prepare(job), size, Path(folder), serving)
        return _read(record.read(path))

    def _run(self, prepared: Prepared, size: int, caches: Path, serving: bool) -> Path:
        """Train on the first `size` images, and return the record."""
        shown = self._train.shown(prepared.images.train.transform)  # as the plan augments them
        trial = prepared.cut_short(
            Short(trained=True, caches=caches),
            _to_its_end(prepared.job.arm.train),
            shown.take(self._order[:size]),
            self.held,
            self._share(prepared.images.unlabeled, size),
            [
                stage.model_copy(update={"train": _to_its_end(stage.train)})
                for stage in prepared.job.arm.stages
            ],
        )
        with trial.tracker(self.session.runs) as run:
            outcome = loop.run(trial, run)
            live = outcome.live
            plain = not any(i.unmergeable or i.shrinks for i in live.installed)
            metric = outcome.metrics[trial.task.primary.name]
            facts: dict[str, Any] = {"images": size, "metric": metric, "plain": plain}
            if serving and not (plain and self._plain_j is not None):
                x, y = next(iter(data.batches(self.held, BATCH)))
                with trial.served(live) as model:
                    facts["served"] = serve(served(model, trial.task, x, y), x, run)["inference"]
            run.fact(trial=facts)
        live.undo()
        assert run.path is not None
        return run.path

    def _share(self, beside: data.ImageSet | None, size: int) -> data.ImageSet | None:
        """Return the share of images without a label that a trial on `size` with one has."""
        if beside is None:
            return None
        order = torch.Generator().manual_seed(self._train.transform.seed)
        most = max(1, round(len(beside) * size / self.images))
        return beside.take(torch.randperm(len(beside), generator=order)[:most])

    def _on_record(self, job: Job, size: int) -> Trial | None:
        """Return the last trial with the same inputs that a run before this one left."""
        folder = self.session.runs / job.recipe.name / job.arm.name
        runs = [*record.readable([folder])] if folder.is_dir() else []
        same = []
        for run in runs:
            facts = run.facts.get("trial") or {}
            if (
                run.status == "done"
                and run.header.get("inputs") == job.inputs
                and facts.get("images") == size
            ):
                same.append(run)
        return _read(max(same, key=lambda run: run.header.get("clock_s", 0.0))) if same else None


def _to_its_end(spec: TrainSpec) -> TrainSpec:
    """Return a training that no target ends."""
    return spec.model_copy(update={"target": None, "eval_every": 0})


def points(
    forecasts: Mapping[str, Mapping[str, extrapolate.Figure]], measure: Measure
) -> dict[str, tuple[float, float]]:
    """Return each plan's total energy and metric as predicted, as `pareto` takes them: more is
    better."""
    sign = 1 if measure.higher_is_better else -1
    return {
        name: (figures["total_energy_j"]["value"], sign * figures["metric"]["value"])
        for name, figures in forecasts.items()
    }


def _read(run: record.Run) -> Trial:
    first, spent, total = (
        pricing.run_energy(run, phase) for phase in ("train/epoch1", "train", None)
    )
    if first.value is None:
        first = spent  # in stages, which have epochs of their own
    if first.value is None or spent.value is None or total.value is None:
        raise GreenvisError(
            f"the energy of a trial is not known here ({total.reason}): see `greenvis doctor`"
        )
    fields = dict(run.facts["trial"])
    if "accuracy" in fields:  # as trials of classification were recorded first
        fields["metric"] = fields.pop("accuracy")
    if served := serving.image(fields.pop("served", {}), run.header["components"]):
        fields["served_j"] = served["value"]
    return Trial(
        first_j=first.value, later_j=spent.value - first.value, total_j=total.value, **fields
    )
