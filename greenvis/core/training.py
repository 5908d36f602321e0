"""What a training loop calls of a wrapped model, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis.core import distributed, trainers
from greenvis.core.random import RandomState
from greenvis.core.seams import Seams, of_known
from greenvis.core.technique import Experience, Installed, Samples
from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks import answers
from greenvis.tasks.base import Task


class Training(Seams):
    """The part of a wrapped model that a training loop calls: before, in and after each step."""

    task: Task | None

    def __init__(self) -> None:
        super().__init__()
        self._learned: set[int] = set()  # parameters that earlier tasks trained
        self._stepped = False  # whether terms were asked for
        self.trained_on = 1  # samples of the last batch that terms were asked for
        self._shared: list[Any] = []  # what makes processes share a pretext's gradients
        self._used: Any = None  # a hook, see `_watch_trainers`

    if TYPE_CHECKING:

        @property
        def trainable(self) -> dict[str, nn.Parameter]: ...

    @property
    def pretext(self) -> bool:
        """Whether a technique does the forward itself, so that the loop calls neither the model nor
        the task loss."""
        return any(live.pretext for live in self.installed)

    def set_samples(self, samples: Samples | None) -> None:
        """Tell the techniques which samples the next batch holds, so that outputs of frozen parts
        can be cached and reused.

        Optional: without it nothing is cached.

        Args:
            samples: The samples of the next batch; None before the model sees anything else (an
                evaluation).
        """
        for live in self.installed:
            live.samples = samples

    def set_domains(self, domains: Tensor | None) -> None:
        """Tell the techniques of which domain the samples of the next batch are.

        Args:
            domains: int64 (batch,), from 0, -1 where it is not known; None: nobody knows.
        """
        for live in self.installed:
            live.domains = domains

    def assess_with(self, loss: Callable[[], float]) -> None:
        """Let techniques ask, as training goes, how good the model is on images held out; before
        the first step.

        Args:
            loss: Returns the task's mean loss on them, of the model as it is, in eval mode.
        """
        for live in self.installed:
            live.held_out_loss = loss

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch to train on: replay adds samples here; otherwise unchanged.

        Args:
            x: Images (batch, channels, height, width), or what the model takes.
            y: Labels (batch, …).

        Returns:
            The images and labels to train on.
        """
        self._adopt_changes()
        self.feeds.begin_step()
        original = x
        for live in self.installed:
            x, y = live.batch(x, y)
        if x is not original:  # these are no longer the samples that were shown
            self.set_samples(None)
        if self.using("again"):
            self._random = RandomState(self.model)
        return x, y

    def terms(self, x: Any, y: Any, logits: Any) -> dict[str, Tensor]:
        """Return all extra loss terms of this step by name.

        Args:
            x: Images (batch, channels, height, width) that `batch` returned.
            y: Their labels.
            logits: (batch, classes), or the model's output that has them; None of a pretext.

        Returns:
            Scalars, already weighted, by name.

        Raises:
            BadInput: Where a technique would read these answers or labels wrongly, or the model is
                sharded.
            GreenvisError: Where two techniques add a term of one name.
        """
        self._adopt_changes()
        self.begin_training()
        if not self._stepped:  # whoever prepared the model after `wrap` may have cut it up
            distributed.refuse_sharding(self.model)
            self.refuse_processes()
            # its forward passes DistributedDataParallel by
            if self.pretext and distributed.world_size() > 1:
                self._shared = distributed.average_gradients(self.trainable.values())
            self._stepped = True
        self._check_task(logits, y)
        self.trained_on = next((len(v) for v in (y, x) if hasattr(v, "__len__")), self.trained_on)
        out: dict[str, Tensor] = {}
        for technique, live in self._pairs():
            for name, value in live.terms(x, y, logits).items():
                if name in out:
                    raise GreenvisError(
                        f"two techniques add a loss term named '{name}'; {technique.name} is the "
                        "second"
                    )
                out[name] = value
        return out

    def loss(self, x: Any, y: Any, logits: Any) -> Tensor:
        """Return the sum of the extra loss terms.

        Args:
            x: Images (batch, channels, height, width) that `batch` returned.
            y: Their labels.
            logits: (batch, classes), or the model's output that has them; None of a pretext.

        Returns:
            A scalar; zero where there are no terms.

        Raises:
            BadInput: As `terms` does.
            GreenvisError: As `terms` does.
        """
        terms = self.terms(x, y, logits)
        if terms:
            return torch.stack(list(terms.values())).sum()
        return torch.zeros(
            (),
            device=next(
                (t.device for t in (*self.model.parameters(), *self.model.buffers())), None
            ),
        )

    def criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the task loss to train with: a technique's, built on `task_loss`, or `task_loss`
        itself.

        Args:
            task_loss: Of logits and labels, as `torch.nn.functional.cross_entropy`.

        Returns:
            A loss with the same arguments.
        """
        for live in self.installed:
            if live.criterion is not None:
                return self._checked(live.criterion(task_loss))
        return of_known(task_loss) if self.wanted else task_loss

    def _checked(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(logits: Any, y: Any = None, *rest: Any, **more: Any) -> Tensor:
            self._check_task(logits, y)
            return criterion(logits, y, *rest, **more)

        return loss

    def step_end(self) -> None:
        """Call after each optimizer step, before the gradients are cleared: some techniques weigh
        parameters by them.

        Raises:
            GreenvisError: Where a technique wants the step's backward `again`, which was not
                called.
        """
        self.check_offered()
        self._repeated = False
        for live in self.installed:
            live.step_end()

    def epoch_end(self) -> None:
        """Call after each epoch."""
        for live in self.installed:
            live.epoch_end()

    def begin_experience(self, experience: Experience) -> None:
        """Call before an experience of a stream, and before its optimizer is built: techniques may
        add parameters here.

        Args:
            experience: The experience to come.
        """
        self._adopt_changes()
        self._learned |= {id(p) for p in self.trainable.values()} if experience.index else set()
        for technique, live in self._pairs():
            declared = live.trainable
            live.begin_experience(experience)
            if live.trainable is not declared:
                self._own(technique, live)
        self._freeze()
        self._optimizers.reset()
        if self._watch is not None:
            self._watch.note()
        self._watch_trainers()

    def eval_experience(self, experience: Experience | None) -> None:
        """Call before an evaluation on images of one task, where the test says so, and when it is
        over.

        Args:
            experience: The experience the images belong to; None when the evaluation is over.
        """
        for live in self.installed:
            live.eval_experience(experience)

    def end_experience(self, loader: Any) -> None:
        """Call at a task boundary.

        Args:
            loader: Yields (x, y) of the finished experience.
        """
        for live in self.installed:
            live.end_experience(loader)

    def begin_task(self, task: Experience) -> None:
        """Call `begin_experience`, which it was in the first releases."""
        warnings.warn("begin_task is begin_experience now", DeprecationWarning, stacklevel=2)
        self.begin_experience(task)

    def end_task(self, loader: Any) -> None:
        """Call `end_experience`, which it was in the first releases."""
        warnings.warn("end_task is end_experience now", DeprecationWarning, stacklevel=2)
        self.end_experience(loader)

    def plan(self, steps: int, seed: int = 0) -> None:
        """Say how long the training is, for techniques with a schedule of their own; call before
        the first step.

        Args:
            steps: Optimizer steps to come.
            seed: Of what techniques draw for epochs ahead.
        """
        for live in self.installed:
            live.total_steps, live.seed = steps, seed

    def meter(self, run: Any) -> None:
        """Let techniques meter phases of their own (a teacher's forward), and write their warnings
        into the record.

        Args:
            run: A tracked run (`gv.track`).
        """
        for live in self.installed:
            live.phase, live.note = run.phase, run.note

    def calibrate(self, loader: Any) -> dict[str, Any]:
        """Let techniques choose their thresholds after training.

        Args:
            loader: Yields held-out (x, y) that no training step has seen.

        Returns:
            Facts for the run record, by name of the technique.
        """
        return {
            t.name: dict(live.calibrate(loader)) for t, live in self._pairs() if live.calibrates
        }

    def operating_points(self) -> dict[str, AbstractContextManager[dict[str, Any]]]:
        """Return the settings between which the finished model can be switched, by name."""
        return {
            name: point
            for live in self.installed
            for name, point in live.operating_points().items()
        }

    def facts(self) -> dict[str, Any]:
        """Return what the techniques say of their work (hits of a cache), by name of the fact."""
        return {key: value for live in self.installed for key, value in live.facts().items()}

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Return the phase context techniques currently use; a no-op until a tracked run is
        given."""
        return self.installed[0].phase(name) if self.installed else Installed().phase(name)

    # -- what it looks at ------------------------------------------------------------------------

    def _refuse_form(self, form: str | None) -> None:
        """Raise BadInput where a technique is not right for what the answers and labels are."""
        if form is not None:
            for technique in self.techniques:
                answers.refuse_task(technique.name, technique.tasks, technique.instead, form)

    def _check_task(self, logits: Any, y: Any) -> None:
        """Refuse answers and labels that a technique would read wrongly, before it does."""
        if self.task is not None and logits is not None:
            self.task.check(self.task.outputs(logits), y)
            return
        forms = [t.tasks for t in self.techniques if t.tasks is not None]
        if self.task is None and forms and (logits is not None or answers.is_tensor(y)):
            try:
                outputs = None if logits is None else answers.logits_of(logits)
            except BadInput:
                if all(form >= answers.IMAGES for form in forms):
                    return  # right whatever a model answers to images
                raise
            self._refuse_form(answers.task_of(outputs, y))

    def _watch_trainers(self) -> None:
        """Notice what a trainer does to the gradients of what techniques declare."""
        for technique, live in self._pairs():
            reads = type(live).terms is not Installed.terms
            trainers.watch(self.model, technique.name, self._owned[technique.name].values(), reads)
        if self._used is not None:
            self._used.remove()
        declared = self.declared
        self._used = (
            self.model.register_forward_hook(trainers.UsedInTerms(declared)) if declared else None
        )
