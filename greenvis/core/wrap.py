"""`wrap(model, techniques)`: install in stage order, refuse conflicts, roll back on failure;
`Wrapped` is the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

from torch import nn

from greenvis.core import distributed
from greenvis.core.beside import LIVE
from greenvis.core.deltas import Deltas
from greenvis.core.module_changes import Optimizers, Watch, forget_compiled, refuse_compiled
from greenvis.core.seams import EXCLUSIVE
from greenvis.core.surgery import Snapshot
from greenvis.core.technique import STAGES, Installed, Technique, refuse_clash, refuse_conflicts
from greenvis.core.training import Training
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.tasks import answers, registry
from greenvis.tasks.base import Task


def wrap(
    model: nn.Module,
    techniques: Technique | Sequence[Technique] = (),
    *,
    task: str | Task | None = None,
    classes: Sequence[str] | None = None,
) -> Wrapped:
    """Install techniques on a model, in place and undoable.

    Args:
        model: The model to change; it stays the user's own object.
        techniques: One technique or several; their order does not matter.
        task: What the model answers, such as "classification"; told by the labels of each step
            where None.
        classes: Names of the classes, by label, for techniques that build on them.

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
    if classes is not None:
        requests = [request.for_classes(tuple(classes)) for request in requests]
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


class Wrapped(Training, Deltas):
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
        self._snapshot = Snapshot(model)
        Training.__init__(self)
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
            self.installed[-1].feeds = self.feeds
            self._own(technique, self.installed[-1])
        self._freeze()
        if sum(live.criterion is not None for live in self.installed) > 1:
            names = [t.name for t, live in self._pairs() if live.criterion is not None]
            raise BadInput(
                f"{some(names)} each replace the task loss; at most one may: remove all but one"
            )
        for seam, what in EXCLUSIVE.items():
            if len(users := self.using(seam)) > 1:
                raise BadInput(
                    f"{some([t.name for t, _ in users])} each {what}; at most one may: remove all "
                    "but one"
                )
        self.refuse_processes()
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

    __repr__ = summary

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
