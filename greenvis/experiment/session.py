"""Recipe -> records: the one place where data, models, techniques, training and meters meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from greenvis import data, models
from greenvis.core import distributed
from greenvis.core.wrap import Wrapped, wrap
from greenvis.data import subsets
from greenvis.errors import BadInput, some
from greenvis.experiment import (
    instances,
    lineage,
    loggers,
    loop,
    parts,
    roles,
    search,
    stages,
    synthesis,
)
from greenvis.experiment.drawn import drawn
from greenvis.experiment.job_data import check_shares, model_options
from greenvis.experiment.jobs import Job, Jobs, forget, located, predicted
from greenvis.experiment.optim import threads
from greenvis.experiment.prepare import Prepared
from greenvis.experiment.recipe import Recipe, load_recipe
from greenvis.experiment.run_folder import WEIGHTS_FILE, locked
from greenvis.experiment.serving import images_in, served
from greenvis.experiment.startup import Beginning
from greenvis.experiment.step import check_again
from greenvis.experiment.watch import Watch, title
from greenvis.meters import memory
from greenvis.meters.measure import compare, measure
from greenvis.meters.track import Tracker
from greenvis.models.folding import fold_norms


def run(
    recipe: Recipe | str | Path,
    *,
    overrides: Sequence[str] = (),
    runs: str | Path = "runs",
    fresh: bool = False,
    trust: bool = False,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    log_with: Sequence[str] = (),
    fresh_process: bool = False,
    watch: Watch | None = None,
) -> Path:
    """Train every arm of a recipe with every seed, metered, and return the folder of its records.

    Finished arms with the same inputs are skipped unless `fresh`; an interrupted one goes on from
    its last checkpoint. All that can be checked is, before anything is written. Several processes
    (torchrun, accelerate launch) train each arm together, on their shares of each batch; each
    writes its own record, the first all else. log_with: see `train.fit`. fresh_process: this
    process was started for this call, so that all it has done is booked as start-up. watch: hears
    how it goes, in the place of `say`. Raises BadInput, GreenvisError.

    Example:
        >>> records = gv.run(recipe, runs=folder / "runs")
        >>> records.relative_to(folder)
        PosixPath('runs/tiny')
    """
    distributed.init_process_group()
    loggers.check(log_with)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    say_once = say if distributed.rank() == 0 else lambda text: None
    first = watch if distributed.rank() == 0 else None
    session = Session(Path(runs), trust, command, say_once, log_with, fresh_process, first)
    jobs = distributed.main_first(partial(session.plan, recipe))
    session.watch.planned(jobs)
    with ExitStack() as held:
        distributed.main_first(partial(held.enter_context, locked(Path(runs) / recipe.name)))
        for job in jobs:
            if fresh and job.recipe is recipe and distributed.rank() == 0:
                forget(job)
            session.run_job(job)
    return Path(runs) / recipe.name


class Session:
    """Checks and runs the jobs of one call."""

    def __init__(
        self, runs: Path, trust: bool, command: Sequence[str], say: Callable[[str], None],
        log_with: Sequence[str] = (),
        fresh_process: bool = False, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.runs, self.trust, self.command, self.say, self.log_with = (
            runs,
            trust,
            list(command),
            say,
            log_with,
        )
        self.watch = watch or Watch(say)
        self.jobs, self.beginning = Jobs(runs), Beginning(fresh_process)
        self._checked: set[tuple[str, str]] = set()
        self._prepared: dict[tuple[Path, str], Prepared] = {}

    def plan(self, recipe: Recipe) -> list[Job]:
        """Return the recipe's jobs with those they build on before them, all checked. Seeds
        interleave the arms."""
        jobs = self.jobs.of(recipe)
        for job in jobs:
            self._check(job)
        return jobs

    def prepare(self, job: Job) -> Prepared:
        """Return a job with all it trains on and with, made once."""
        key = (job.folder, job.inputs)
        if key not in self._prepared:
            images = self.jobs.images(job.recipe, job.arm, job.seed)
            self._prepared[key] = Prepared(
                job, images, self.runs, self.trust, self.command, self.prepare
            )
        return self._prepared[key]

    def run_job(self, job: Job) -> None:
        """Run a job unless it is done."""
        waiting = partial(
            self.watch.say, f"{title(job)}: another process is at it; waiting for it to end"
        )
        with ExitStack() as held:  # other recipes may build on the same run
            distributed.main_first(partial(held.enter_context, locked(job.folder, waiting)))
            if distributed.on_main(lambda: job.done() is not None):
                distributed.on_main(partial(forget, job, done=False))  # killed before it could
                others = job.other_versions()
                unlogged = (
                    f": nothing to log with {some(self.log_with)} (--fresh trains again)"
                    if self.log_with
                    else ""
                )
                made = f" (made with other versions: {others})" if others else ""
                self.watch.skipped(job, made + unlogged)
                return
            spoiled = (
                "; the weights that lie there are not those its run left, so it trains again"
                if job.spoiled()
                else ""
            )
            self.watch.began(job, spoiled)
            with threads(job.arm.train.threads):
                self._train(self.prepare(job))

    # -- before anything is written ---------------------------------------------------------------

    def _check(self, job: Job) -> None:
        """Build and wrap the arm once and show it two images, so that what cannot work fails before
        anything is written."""
        key = (str(job.recipe.path), job.arm.name)
        if key in self._checked:
            return
        self._checked.add(key)
        where = job.recipe.where("arms", job.arm.name)
        prepared = self.prepare(job)
        images = prepared.images
        located(job.recipe.where("data", "stream"), lambda: prepared.stream)
        if job.arm.subset is not None:
            located(
                job.recipe.where("arms", job.arm.name, "subset"),
                subsets.check,
                images.train,
                job.arm.subset.per_class,
            )
        if job.arm.synthesis is not None:
            located(
                job.recipe.where("arms", job.arm.name, "synthesis"),
                synthesis.planned,
                prepared,
                job.arm.synthesis,
            )
        check_shares(job, images)
        model = prepared.build(weights=False)
        lineage.check_range(job, images.facts())
        stages.check(prepared, model)
        requests = prepared.techniques(trained=False)
        live = located(where, wrap, model, requests, task=prepared.task)
        located(job.recipe.where("data"), roles.check, prepared, live)
        if images.held_out is None and any(i.calibrates for i in live.installed):
            live.undo()
            names = some(
                [
                    t.name
                    for t, i in zip(live.techniques, live.installed, strict=True)
                    if i.calibrates
                ]
            )
            raise BadInput(
                f"{where}: {names} calibrates on images that no training has seen: set "
                "data.held_out, such as 2000"
            )
        if job.arm.search is not None:
            located(job.recipe.where("arms", job.arm.name, "search"), search.check, live)
        located(where, check_again, live, job.arm.train)
        located(where, parts.check_feeds, live, parts.feeds_of(images))
        located(where, parts.check_visits, live, prepared.stream is None)
        x, y = next(iter(data.batches(images.test, 2)))
        shape = "×".join(str(n) for n in images_in(x).shape[1:])
        try:
            with torch.no_grad():
                outputs = prepared.task.answer(model.eval(), x, y)
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        except (RuntimeError, ValueError, AssertionError) as error:
            raise BadInput(
                f"{where}: {job.arm.model.ref} cannot take images of {shape} (channels × height × "
                f"width): {error}; set "
                "data.in_chans and data.img_size to what the model wants, or the model's own "
                "in_chans and img_size"
            ) from error
        finally:
            live.undo()
        located(where, models.check_size, job.arm.model.options, images_in(x).shape)
        located(where, prepared.task.check, outputs, y, len(images.classes))
        if job.arm.model.fold_norms:
            located(where, fold_norms, model, x)

    # -- the run ----------------------------------------------------------------------------------

    def _train(self, prepared: Prepared) -> None:
        job = prepared.job
        job.folder.mkdir(parents=True, exist_ok=True)
        codecarbon = job.recipe.meter.codecarbon and distributed.world_size() == 1
        with prepared.tracker(self.runs, codecarbon) as tracker:
            self.watch.metered(tracker, prepared.task.primary)
            self.beginning.book(tracker, prepared)
            memory.reset_peak()
            _facts(prepared, tracker)
            outcome = loop.run(prepared, tracker, log_with=self.log_with)
            live = outcome.live
            metrics = _calibrated(prepared, live, tracker) or outcome.metrics
            distributed.on_main(lambda: roles.on_tests(prepared, live, tracker, metrics))
            distributed.on_main(lambda: instances.on_test(prepared, live, tracker))
            if prepared.stream is not None:
                facts = prepared.stream.facts()
                tracker.fact(stream=facts, task_observed=outcome.observed, **outcome.rows)
            if job.arm.active is not None:
                spec = {**job.arm.active.model_dump(), "bought": outcome.rounds}
                tracker.fact(active=spec, task_observed=outcome.observed)
            tracker.fact(
                **metrics,
                epochs=outcome.epochs,
                delta_bytes=sum(t.nbytes for t in outcome.delta.values()),
                peak_memory_mb=memory.peak_mb(),
                **live.facts(),
            )
            if adapting := [t.name for t, _ in live.using("adapts")]:
                tracker.fact(adapts=adapting)
            with prepared.served(live) as model, tracker.phase("measure"):
                distributed.on_main(lambda: _measure(prepared, live, model, tracker))

        def keep() -> None:
            origin = {
                "ref": job.arm.model.ref,
                "options": model_options(job, prepared.images),
                "folder": job.recipe.folder,
            }
            card = lineage.card(job, metrics)
            with live.served():
                models.save(model, job.folder / WEIGHTS_FILE, card=card, **origin)
            job.finished(tracker.id)
            forget(job, done=False)

        distributed.barrier()  # until the record of each process is whole: the card counts them all
        distributed.on_main(keep)
        self.watch.ended(job, tracker, metrics)


def _measure(prepared: Prepared, live: Wrapped, model: nn.Module, tracker: Tracker) -> None:
    """Record what the finished model costs to serve, at each of the settings it can be switched
    between."""
    test = prepared.images.test
    serve = prepared.job.arm.serve
    x, y = next(iter(data.batches(test, 64 if serve is None else serve.batch_size)))
    tracker.fact(**measure(served(model, prepared.task, x, y), x, tracker))
    device = next(model.parameters()).device
    answer = lambda x, y: prepared.task.answer(model, x.to(device), _on(y, device))  # noqa: E731
    if live.operating_points():
        batches = lambda: data.batches(test, 64)  # noqa: E731
        points = compare(live.operating_points, answer, batches, tracker, task=prepared.task)
        tracker.fact(operating_points=points)
    if shown := drawn(
        live.operating_points, answer, prepared.task, test, len(prepared.images.classes)
    ):
        tracker.fact(drawn=shown)


def _on(labels: object, device: torch.device) -> object:
    """Return labels on a device; lists of boxes are read by no answer, and stay."""
    return labels.to(device) if isinstance(labels, torch.Tensor) else labels


def _calibrated(prepared: Prepared, live: Wrapped, tracker: Tracker) -> dict[str, float]:
    """Let techniques choose on the images held out; return the metrics of the model as it then is,
    {} where nothing is to be chosen."""
    images = prepared.images
    if not any(i.calibrates for i in live.installed) or images.held_out is None:
        return {}
    with tracker.phase("calibrate"):
        tracker.fact(calibration=live.calibrate(data.batches(images.held_out, 256)))
        live.model.eval()
    with tracker.phase("eval"):
        metrics = parts.evaluator(prepared).on_test(live)
    tracker.log(**metrics)
    return metrics


def _facts(prepared: Prepared, tracker: Tracker) -> None:
    """Record what is trained, on what, from what."""
    job = prepared.job
    spec = job.arm.model
    requests = [t for arm in (job.arm, *job.arm.stages) for t in arm.techniques]
    tracker.fact(
        task=prepared.task.facts(),
        model={"ref": spec.ref, "options": spec.options, "init": spec.init}
        | ({"fold_norms": True} if spec.fold_norms else {})
        | ({"average": [*spec.average]} if spec.average else {}),
        data=prepared.images.facts(),
        techniques=[{t.name: t.recipe_form()} for t in requests],
        train=job.arm.train.model_dump(),
        threads=torch.get_num_threads(),
        predicted=predicted(job),
    )
    if (noise := roles.spoiled(prepared.images)) is not None:
        tracker.fact(noise=noise)
    for line in lineage.ancestors(job):
        tracker.uses(**line)
