"""Distillation at work: teachers that are asked, taps on the student, and the terms of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.attached import below
from greenvis.core.example import tensors_in
from greenvis.core.surgery import names_of
from greenvis.core.technique import Installed, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.attach import seat
from greenvis.techniques.inference.distill import _teachers as teaching
from greenvis.techniques.inference.distill._comparison import Comparison, Projections
from greenvis.techniques.inference.distill._frozen_teacher import (
    ANSWER,
    ITSELF,
    CacheOptions,
    FrozenTeacher,
)
from greenvis.techniques.inference.distill._layers import TapPoint, Taps
from greenvis.techniques.inference.distill._losses import Loss

if TYPE_CHECKING:
    from greenvis.techniques.inference.distill.distill import Distill


_CHILD = "distill_projections"


class InstalledDistill(Installed):
    """The teachers at work."""

    def __init__(
        self,
        request: Distill,
        modules: Mapping[str, nn.Module],
        compared: Sequence[tuple[str, Comparison | None]],
        model: nn.Module,
    ) -> None:
        super().__init__()
        self.request = request
        self.epoch = self.steps = 0
        cache_options = (
            CacheOptions.model_validate({}) if request.cache is True else request.cache or None
        )
        options = (request.precision, cache_options, lambda text: self.note(text))
        names = {
            n: any(loss.on_answers and loss.teacher in (n, None) for loss in request.losses)
            for n in modules
        }
        self.teachers = {
            n: FrozenTeacher(n, modules[n], t.size, *options, model, names[n])
            for n, t in request._all().items()
        }
        self._model = model
        self._compared = list(zip(request.losses, compared, strict=True))
        self._points: dict[str, list[TapPoint]] = {n: [] for n in modules}
        for name, comparison in compared:
            self._points[name] += list(comparison.teacher.values()) if comparison else []
        mine = [p for _, c in compared if c for p in c.student.values()]
        self._heads: tuple[TapPoint, ...] = ()
        self._project(
            model,
            {i: m for i, (_, c) in enumerate(compared) if c and (m := c.modules()) is not None},
        )
        self._taps = Taps(model, mine, learning=True)
        self._head_taps = Taps(model, (), learning=True)
        self._conflicts = teaching.Conflicts()
        if request.task_weight != 1.0:
            self.criterion = self._task
        for teacher in self.teachers.values():
            teacher.begin()

    def hear(self, model: nn.Module, heads: Sequence[str]) -> None:
        """Listen to the two heads apart: the task is for the class token's, the teacher for the
        other."""
        self._heads = tuple(TapPoint(path) for path in heads)
        self._head_taps = Taps(model, self._heads, learning=True)
        self.criterion = self._task

    @property
    def teaching(self) -> bool:
        """Whether the teachers are still asked."""
        return self.request.teacher_epochs is None or self.epoch < self.request.teacher_epochs

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"distill_KIND": weight · loss} for each loss; nothing once the teachers' epochs
        are over, or for answers that no gradient leads to (attentions that are aligned first)."""
        if logits is None:
            raise GreenvisError(
                "distill needs the student's logits; a pretext technique gives none: use them in "
                "separate stages"
            )
        if not self.teaching:
            self._taps.on = self._head_taps.on = False
            return {}
        own = self._taps.take()
        heads = list(self._head_taps.take().values())
        if torch.is_grad_enabled() and not any(t.requires_grad for t in tensors_in(logits)):
            return {}
        if self.request.cache and self.samples is None and not self.steps:
            self.note("distill: nothing is cached, for the loop does not say which samples a batch "
                      "holds (`Wrapped.set_samples`), "
                      "or another technique changes the batch")  # fmt: skip
        with self.phase("teacher"):
            answers = self.request._answers
            teacher_outputs = {
                n: t.outputs(x, self._points[n], self.samples, answers)
                for n, t in self.teachers.items()
            }
        out: dict[str, Tensor] = {}
        student, target = torch.empty(0), None
        if answers:
            reads = any(
                loss.reads_labels for loss in self.request.losses
            ) or self.request.combine in ("confidence", "learned")
            student, target = teaching.compared_rows(
                logits_of(logits).float(), teacher_outputs, y if reads else None
            )
            logits = torch.stack([outputs[ANSWER].float() for outputs in teacher_outputs.values()])
            self._conflicts.add(student, logits, self.request.temperature)
            out.update(self._learn_weights(logits, target))
        for i, (loss, (name, comparison)) in enumerate(self._compared):
            if comparison is None:
                temperature = loss.temperature or self.request.temperature
                whose = heads[1].float() if loss.kind == "token" else student
                value = loss.answer(
                    whose,
                    self._together(loss, teacher_outputs, target, temperature),
                    target,
                    temperature,
                )
            else:
                value = comparison.value(
                    own,
                    teacher_outputs[name],
                    x.shape[-2] / x.shape[-1],
                    getattr(self._projections, str(i), None),
                )
            key = f"distill_{loss.kind}"
            out[key if key not in out else f"{key}_{i}"] = (
                self.request.weight * loss.factor(self.epoch) * value
            )
        return out

    def step_end(self) -> None:
        """Move the teacher that is the student's own mean."""
        self.steps += 1
        for name, teacher in self.request._all().items():
            if isinstance(teacher.model, str) and teacher.model == ITSELF:
                self.teachers[name].follow(
                    self._model, min(self.request.momentum, 1 - 1 / self.steps)
                )

    def epoch_end(self) -> None:
        """Count the epoch, and sum up its conflicts."""
        self.epoch += 1
        self._conflicts.end()

    def facts(self) -> Mapping[str, Any]:
        """Return what caches did, and epoch by epoch how much teachers contradict each other
        (`_teachers.conflict`)."""
        caches = [fact for t in self.teachers.values() for fact in t.facts()]
        learned = getattr(self._projections, "teachers", None)
        weights = (
            {}
            if learned is None
            else dict(zip(self.teachers, learned.detach().softmax(0).tolist(), strict=True))
        )
        shown = {n: t.shown.fact for n, t in self.teachers.items() if t.shown.fact}
        facts = {
            "distill_cache": caches, "distill_conflict": self._conflicts.history,
            "distill_teachers": weights,
            "distill_images": shown,
        }  # fmt: skip
        return {name: value for name, value in facts.items() if value}

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far it has come, and the weights of a teacher that is the student's own
        mean."""
        state = {"epoch": torch.tensor(self.epoch), "steps": torch.tensor(self.steps)}
        if self.request._itself:
            for name, teacher in self.teachers.items():
                state.update(
                    {
                        f"{name}.{key}": value.detach()
                        for key, value in teacher.module.state_dict().items()
                    }
                )
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.epoch, self.steps = (
            int(state[key]) if key in state else 0 for key in ("epoch", "steps")
        )
        for name, teacher in self.teachers.items():
            if own := below(state, f"{name}."):
                teacher.module.load_state_dict(own)

    def undo(self) -> None:
        """Take the taps off, let go of the caches, give the teachers their own modes back."""
        self._taps.remove()
        self._head_taps.remove()
        for teacher in self.teachers.values():
            teacher.end()

    # -- parts of a step --------------------------------------------------------------------------

    def _project(self, model: nn.Module, parts: Mapping[int, nn.Module]) -> None:
        """Give the student a child that holds what is trained beside it."""
        learned = 0
        if self.request.combine == "learned" and len(self.teachers) > 1:
            learned = len(self.teachers)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self._projections = Projections(parts, learned).to(like.device)
        if not parts and not learned:
            return
        home = seat(model, "")
        if home is None:
            raise BadInput(
                f"{type(model).__name__} runs every module it holds, so projections have no place "
                "in it"
            )
        home.add_module(_CHILD, self._projections)
        self.trainable = names_of(model, self._projections.parameters())

    def _task(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def weighted(logits: Tensor, *rest: Any, **more: Any) -> Tensor:
            if not self.teaching:
                return task_loss(logits, *rest, **more)
            if self._heads:
                logits = self._head_taps.peek(self._heads[0].key)
            return self.request.task_weight * task_loss(logits, *rest, **more)

        return weighted

    def _together(
        self,
        loss: Loss,
        teacher_outputs: Mapping[str, Mapping[str, Tensor]],
        target: Any,
        temperature: float,
    ) -> Tensor:
        """Return the logarithms of what the teachers answer together, softened, (rows, classes)."""
        names = [loss.teacher] if loss.teacher else list(teacher_outputs)
        logits = torch.stack([teacher_outputs[n][ANSWER].float() for n in names])
        if len(names) == 1:
            return F.log_softmax(logits[0] / temperature, dim=-1)
        prior = [t.weight for t in self.request._all().values()]
        if self.request.combine == "confidence" and target is None:
            raise BadInput(
                "combine: confidence weighs teachers by the right class, so it needs labels; use "
                "agreement without"
            )
        learned = getattr(self._projections, "teachers", None)
        weights = teaching.weights_of(
            self.request.combine,
            logits,
            target,
            prior,
            temperature,
            learned.detach() if learned is not None else None,
        )
        return teaching.mixed(F.log_softmax(logits / temperature, dim=-1), weights)

    def _learn_weights(self, logits: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Return the loss that the teachers' learned weights minimise: that of their common answer
        for the right class."""
        learned = getattr(self._projections, "teachers", None)
        if learned is None:
            return {}
        if target is None:
            raise BadInput(
                "combine: learned learns from the right class, so it needs labels; use agreement "
                "without"
            )
        weights = teaching.weights_of("learned", logits, None, [1.0] * len(logits), 1.0, learned)
        return {
            "distill_teachers": F.nll_loss(
                teaching.mixed(F.log_softmax(logits, dim=-1), weights), target
            )
        }
