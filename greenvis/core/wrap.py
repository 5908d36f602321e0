"""`wrap(model, techniques)`: install in stage order, refuse conflicts, roll back on failure;
`Wrapped` is the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core import distributed, trainers
from greenvis.core.deltas import LIVE, Deltas
from greenvis.core.module_changes import Optimizers, Watch, forget_compiled, refuse_compiled
from greenvis.core.owners import Owners
from greenvis.core.surgery import Snapshot
from greenvis.core.technique import (
    STAGES,
    Experience,
    Installed,
    Samples,
    Technique,
    refuse_clash,
    refuse_conflicts,
)
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.tasks import answers, registry
from greenvis.tasks.base import Task


def wrap(
    model: nn.Module,
    techniques: Technique | Sequence[Technique] = (),
    *,
    task: str | Task | None = None,
) -> Wrapped:
    """Install techniques on a model, in place and undoable.

    Args:
        model: The model to change; it stays the user's own object.
        techniques: One technique or several; their order does not matter.
        task: What the model answers, such as "classification"; told by the labels of each step
            where None.

    Returns:
        The live changes, and the seams a training loop calls.

    Raises:
        BadInput: For a conflict, a technique that is not right for the task, a model that does not
            fit, is wrapped already, or is to be sharded (FSDP, DeepSpeed). The model is then
            unchanged.

    Example:
        >>> live = gv.wrap(model, [gv.Lora(rank=4), gv.TokenMerge(r=2)])
        >>> [technique.name for technique in live.techniques]
        ['lora', 'token_merge']
        >>> live.undo() is model
        True
        >>> live = gv.wrap(model, gv.Ncm(), task="classification")
    """
    requests = [techniques] if isinstance(techniques, Technique) else list(techniques)
    if not isinstance(model, nn.Module):
        raise BadInput(f"wrap() takes a torch.nn.Module, not {type(model).__name__}")
    for request in requests:
        if not isinstance(request, Technique):
            hint = f"; write {request.__name__}(…)" if isinstance(request, type) else ""
            raise BadInput(f"wrap() takes techniques, not {request!r}{hint}")
    if model in LIVE:
        raise BadInput(
            f"this {type(model).__name__} is wrapped already (with "
            f"{some(LIVE[model][0]) or 'nothing'}): give all techniques "
            "to one wrap(), or call undo() or merge() first"
        )
    if any(isinstance(hook, Watch) and hook.parts for hook in model._forward_pre_hooks.values()):
        raise BadInput(
            f"this {type(model).__name__} is a copy of a wrapped one, with all that hangs on it: "
            "wrap a copy of the plain one"
        )
    distributed.refuse_sharding(model)
    refuse_compiled(model)
    requests.sort(key=lambda t: (STAGES.index(t.stage), t.order, t.name))
    refuse_conflicts(requests)
    return Wrapped(model, requests, None if task is None else registry.resolve(task))


class Wrapped(Owners, Deltas):
    """A model with techniques live on it, and the seams a training loop calls. `model` is the
    user's own object.

    Example:
        >>> live = gv.wrap(model, gv.Lora(rank=4))
        >>> optimizer = torch.optim.AdamW(live.param_groups(lr=1e-3))
        >>> x, y = live.batch(x, y)
        >>> outputs = model(x)
        >>> loss = F.cross_entropy(outputs, y) + live.loss(x, y, outputs)
        >>> loss.backward()
        >>> optimizer.step()
        >>> live.step_end()
        >>> live.undo() is model  # as it was, to the bit
        True
    """

    def __init__(
        self, model: nn.Module, techniques: Sequence[Technique], task: Task | None = None
    ) -> None:
        self.model, self.task = model, task
        self.techniques = tuple(techniques)
        self.installed: list[Installed] = []
        self._learned: set[int] = set()  # parameters that earlier tasks trained
        self._stepped = False  # whether terms were asked for
        self.trained_on = 1  # samples of the last batch that terms were asked for
        self._shared: list[Any] = []  # what makes processes share a pretext's gradients
        self._used: Any = None  # a hook, see `_watch_trainers`
        self._snapshot = Snapshot(model)
        Owners.__init__(self)
        Deltas.__init__(self)
        try:
            self._install()
        except BaseException:
            self._release()
            self._snapshot.restore()
            raise
        self._snapshot.forget_unchanged()
        self._watch = Watch(self)
        self._optimizers = Optimizers(self)
        forget_compiled()
        self._register()

    def _install(self) -> None:
        self._refuse_form(self._form())
        for technique in self.techniques:
            self.installed.append(self._install_one(technique))
            self._own(technique, self.installed[-1])
        self._freeze()
        if sum(live.criterion is not None for live in self.installed) > 1:
            names = [t.name for t, live in self._pairs() if live.criterion is not None]
            raise BadInput(
                f"{some(names)} each replace the task loss; at most one may: remove all but one"
            )
        pretext = next((t.name for t, live in self._pairs() if live.pretext), None)
        for technique, live in self._pairs():
            learns = (
                live.freezes
                or live.trainable
                or live.criterion is not None
                or type(live).terms is not Installed.terms
            )
            if pretext is not None and not live.pretext and learns:
                raise BadInput(
                    f"'{pretext}' and '{technique.name}' do not go together: '{pretext}' is a "
                    "pretext, which trains the whole model without its answers, and "
                    f"'{technique.name}' learns from these; use them in separate stages"
                )
        for (a, one), (b, other) in permutations(self._pairs(), 2):
            refuse_clash(a, b, _broken(a, one) & _needed(b, other))
        self._watch_trainers()

    def _install_one(self, technique: Technique) -> Installed:
        """Install one technique; a refusal names those that changed the model before it."""
        before = [t.name for t in self.techniques[: len(self.installed)]]
        try:
            return technique.install(self.model)
        except BadInput as error:
            if not before:
                raise
            raise BadInput(
                f"'{technique.name}', put in after {some(before)}: {error}; if it fits alone, "
                "remove one"
            ) from error

    def _form(self) -> str | None:
        """Return the form of the task, as the caller or the model's configuration names it."""
        declared = answers.declared_task(self.model)
        if self.task is None:
            return declared
        if declared is not None and self.task.form != declared:
            raise BadInput(
                f"task= says {self.task.name}, and the configuration of this "
                f"{type(self.model).__name__} {declared} (problem_type): change one of them"
            )
        return self.task.form

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
        readable = logits is not None or answers.is_tensor(y)
        if self.task is None and readable and any(t.tasks is not None for t in self.techniques):
            outputs = None if logits is None else answers.logits_of(logits)
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

    # -- the seams of a training step -------------------------------------------------------------

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

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch to train on: replay adds samples here; otherwise unchanged.

        Args:
            x: Images (batch, channels, height, width), or what the model takes.
            y: Labels (batch, …).

        Returns:
            The images and labels to train on.
        """
        self._adopt_changes()
        original = x
        for live in self.installed:
            x, y = live.batch(x, y)
        if x is not original:  # these are no longer the samples that were shown
            self.set_samples(None)
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
        return task_loss

    def _checked(self, criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(logits: Any, y: Any = None, *rest: Any, **more: Any) -> Tensor:
            self._check_task(logits, y)
            return criterion(logits, y, *rest, **more)

        return loss

    def step_end(self) -> None:
        """Call after each optimizer step, before the gradients are cleared: some techniques weigh
        parameters by them."""
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

    def plan(self, steps: int) -> None:
        """Say how long the training is, for techniques with a schedule of their own; call before
        the first step.

        Args:
            steps: Optimizer steps to come.
        """
        for live in self.installed:
            live.total_steps = steps

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

    # -- parameters and state ---------------------------------------------------------------------

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimizer groups: the techniques' own first, every other trainable parameter at
        `lr`.

        Args:
            lr: The learning rate.

        Returns:
            Groups for a `torch.optim` optimizer.

        Raises:
            GreenvisError: Where nothing is trainable, or two techniques want the same parameter.
        """
        self._adopt_changes()
        groups = [g for live in self.installed for g in live.param_groups(lr)]
        grouped = [id(p) for g in groups for p in g["params"]]
        if len(grouped) != len(set(grouped)):
            raise GreenvisError("two techniques want the same parameter in groups of their own")
        rest = [p for p in self.trainable.values() if id(p) not in set(grouped)]
        if rest:
            groups.append({"params": rest, "lr": lr})
        if not groups:
            raise GreenvisError(
                "nothing is trainable: every parameter is frozen and no technique added one"
            )
        return groups

    # -- the ends ---------------------------------------------------------------------------------

    def merge(self) -> nn.Module:
        """Fold everything into the model's own weights; `undo` still works afterwards.

        Returns:
            The model: plain, loadable without greenvis.

        Raises:
            GreenvisError: Where a technique cannot be folded; nothing is changed then.
        """
        self.check_foldable()
        self._adopt_changes()
        if self._watch is not None:
            self._watch.refuse_lost({id(module) for module, _, _ in self._snapshot._modules})
        self._snapshot.keep_values()
        self._release()
        self.fold()
        return self.model

    def fold(self) -> None:
        """Give the model its own structure back and fold the techniques into its weights: a part of
        `merge`."""
        modes = {module: module.training for module in self.model.modules()}
        self._snapshot.restore(values=False)
        if self._watch is not None:
            self._watch.restore_adopted()
        for module in self.model.modules():
            module.training = modes.get(module, self.model.training)
        for live in reversed(self.installed):
            live.merge()

    def for_inference(self) -> nn.Module:
        """Prepare the model to be served, in eval mode.

        Returns:
            The model: merged where every technique can be, else with the techniques in it.
        """
        model = self.model if any(live.unmergeable for live in self.installed) else self.merge()
        return model.eval()

    def undo(self) -> nn.Module:
        """Take everything back, training included, bit for bit: weights, keys, hooks, flags, mode.

        Returns:
            The model as it was before `wrap`.
        """
        self._release()
        self._snapshot.restore()
        return self.model

    def _release(self) -> None:
        for hook in self._shared:
            hook.remove()
        self._shared.clear()
        for live in reversed(self.installed):
            live.undo()
        if LIVE.pop(self.model, None) is not None:
            self._optimizers.release()
            self._start = None
            forget_compiled()

    # -- what it is -------------------------------------------------------------------------------

    def recipe_form(self) -> list[Any]:
        """Return the techniques as a recipe writes them; a model given as an object stands as its
        class name."""
        return [{t.name: t.recipe_form()} for t in self.techniques]

    def summary(self) -> str:
        """Describe in a few lines what is installed, what learns and how large the delta is."""
        total = sum(p.numel() for p in self.model.parameters())
        learning = sum(p.numel() for p in self.trainable.values())
        size = sum(t.numel() * t.element_size() for t in self.state_dict().values())
        lines = [
            f"{type(self.model).__name__} with "
            f"{', '.join(t.name for t in self.techniques) or 'no technique'}"
        ]
        lines += [f"  {t.name}: {t.recipe_form() or 'defaults'}" for t in self.techniques]
        lines.append(
            f"  trains {learning:,} of {total:,} parameters ({learning / max(total, 1):.2%}); "
            f"delta {size / 1e6:.2f} MB"
        )
        return "\n".join(lines)

    def _pairs(self) -> Iterator[tuple[Technique, Installed]]:
        return zip(self.techniques, self.installed, strict=False)


def _broken(technique: Technique, live: Installed) -> frozenset[str]:
    """Return what a technique breaks as it was put in: one that freezes all but its own leaves no
    base to train."""
    frozen = live.freezes and "trainable_base" not in technique.needs
    return technique.breaks | ({"trainable_base"} if frozen else set())


def _needed(technique: Technique, live: Installed) -> frozenset[str]:
    """Return what a technique needs as it was put in: one that trains something needs its
    gradients."""
    trains = bool(live.trainable) and "gradients" not in technique.breaks
    return technique.needs | ({"gradients"} if trains else set())
