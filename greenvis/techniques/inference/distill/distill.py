"""Knowledge distillation: a small student learns from large frozen teachers, their answers,
features and relations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique, logits_of
from greenvis.core.weights import below
from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.models.structure import view
from greenvis.tasks.answers import CLASSES, IMAGES, PIXELS_TOO
from greenvis.techniques._shared.attach import seat
from greenvis.techniques.inference.distill import _teachers as teaching
from greenvis.techniques.inference.distill._frozen_teacher import (
    ANSWER,
    ITSELF,
    CacheOptions,
    FrozenTeacher,
    Teacher,
    built,
)
from greenvis.techniques.inference.distill._kd import dkd_loss, kd_loss, kd_task_loss
from greenvis.techniques.inference.distill._layers import TapPoint, Taps
from greenvis.techniques.inference.distill._losses import Comparison, Loss, Projections, compare

__all__ = [
    "CacheOptions",
    "Distill",
    "InstalledDistill",
    "Loss",
    "Teacher",
    "dkd_loss",
    "kd_loss",
    "kd_task_loss",
]

_CHILD = "distill_projections"
_SIMPLE = "teacher"


def _two(model: nn.Module) -> dict[str, Any]:
    return {"other": copy.deepcopy(model), "own": ITSELF}


class Distill(Technique):
    """Learn from frozen teachers: their soft answers (Hinton et al., 2015), features, or relations.

    Saves inference energy, where the student is smaller than the model it replaces: it stays a
    plain model, and merges. Costs one forward of each teacher a step, in the phase "teacher", and
    the teachers' own training: it pays back after N* images served, or never. `cache` keeps what a
    teacher says, so that it is asked once per image and view, not once per epoch;
    `teacher_epochs` stops asking early; `precision` makes each forward cheaper. Adds a
    term "distill_KIND" for each loss.

    teacher "ema" is the student's own running mean (Tarvainen & Valpola, 2017). Each teacher is
    shown the images in its own channels, and with its own mean and deviation where it and the
    student say theirs; its answers go to the student's classes of the same names, where both name
    them. Of a segmentation model answers are compared over classes at each pixel, a mean over
    pixels. With a "token" loss the task is learned by the class token's head alone, as in DeiT.
    Losses on features project the student's channels to the teacher's where they must (trained
    along, saved in the delta, gone after merge or undo), pool maps to the smaller grid, and lay
    patches of tokens out as a map: so tokens must not be pruned or added; merged ones count as the
    patches they hold. `residual` is in the spirit of MonoTAKD (Liu et al., 2024). Of several
    teachers `facts` say how much they contradict each other. That a model's last exit teaches its
    earlier ones is an option of the technique that gives it exits (there called `distill`, too).

    Example:
        >>> live = gv.wrap(model, gv.Distill(teacher=teacher, temperature=2.0))
        >>> loss = F.cross_entropy(model(x), y) + live.loss(x, y, model(x))
        >>> sorted(live.terms(x, y, model(x)))
        ['distill_kd']
    """

    name = "distill"
    stage = "objective"
    instead = "distil features (hint, cosine, attention_transfer, rkd), which compare no classes"
    examples = (
        {"teacher": copy.deepcopy, "temperature": 2.0},
        {
            "teachers": _two,
            "combine": "learned",
            "losses": [
                {"kind": "dkd"},
                {"kind": "hint", "teacher": "other", "residual": True},
                {"kind": "review", "teacher": "other", "width": 8},
                {"kind": "cosine", "teacher": "own"},
            ],
        },
    )

    teacher: Any = Field(
        default=None,
        description='a model, or a reference: "run:NAME", "file:PATH", "timm/NAME", …; "ema": '
        "itself",
    )
    teachers: dict[str, Teacher] | None = Field(
        default=None, description="several by name, each as a model or with weight and size"
    )
    combine: Literal["fixed", "agreement", "confidence", "learned"] = Field(
        default="fixed", description="how several teachers' answers are weighed"
    )
    losses: tuple[Loss, ...] = Field(
        default=(Loss.model_validate({"kind": "kd"}),), min_length=1, description="what is compared"
    )
    temperature: float = Field(default=4.0, gt=0, description="softens both answers")
    weight: float = Field(default=1.0, ge=0, description="factor of all distillation terms")
    task_weight: float = Field(
        default=1.0, ge=0, description="factor of the task loss, while the teacher is asked"
    )
    size: int | None = Field(
        default=None, gt=0, description="side in pixels at which the teacher sees the images"
    )
    momentum: float = Field(default=0.999, ge=0, lt=1, description='of "ema"')
    teacher_epochs: int | None = Field(
        default=None, ge=1, description="epochs with a teacher; the rest go without"
    )
    cache: bool | CacheOptions = Field(
        default=False, description="keep what the teacher says on disk"
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="of the teacher's forward; the training's where absent"
    )
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if (self.teacher is None) == (self.teachers is None):
            raise ValueError("give either 'teacher' or 'teachers'")
        if self.teachers is not None and (not self.teachers or self.size is not None):
            raise ValueError("'teachers' names at least one, each with a `size` of its own")
        for loss in self.losses:
            if loss.teacher is not None and loss.teacher not in (self.teachers or ()):
                raise ValueError(
                    f"no teacher '{loss.teacher}' among "
                    f"'teachers'{nearest(loss.teacher, self.teachers or ())}"
                )
            if loss.teacher is None and not loss.on_answers and len(self.teachers or ()) > 1:
                raise ValueError(
                    f"'{loss.kind}' compares features, of one teacher: say which in its `teacher`"
                )
        if self._itself and self.cache:
            raise ValueError("'ema' changes with every step, so there is nothing to cache")
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What another technique must not break: features of tokens are compared place by place."""
        if all(loss.on_answers for loss in self.losses):
            return frozenset()
        return frozenset({"token_places"})

    @property
    def tasks(self) -> frozenset[str] | None:  # type: ignore[override]
        """What it is right for: answers are compared as distributions over classes, features
        whatever the answer to images is."""
        if not self._answers:
            return IMAGES
        if any(loss.kind == "token" for loss in self.losses):
            return CLASSES
        # rows of features are images, and those of answers bags
        return PIXELS_TOO | {"bags"} if not self.needs else PIXELS_TOO

    @property
    def _answers(self) -> bool:
        return any(loss.on_answers for loss in self.losses)

    @property
    def _itself(self) -> bool:
        return any(isinstance(t.model, str) and t.model == ITSELF for t in self._all().values())

    def _all(self) -> dict[str, Teacher]:
        return self.teachers or {_SIMPLE: Teacher(model=self.teacher, size=self.size)}

    def runs(self) -> dict[str, str]:
        """Return teachers that name another run, by field and name."""
        several = {
            f"teachers.{n}": t.model
            for n, t in (self.teachers or {}).items()
            if isinstance(t.model, str)
        }
        return super().runs() | {key: ref for key, ref in several.items() if ref.startswith("run:")}

    def with_runs(self, results: Mapping[str, Any]) -> Technique:
        """Return the request with models in the place of the runs."""
        if self.teachers is None:
            return super().with_runs(results)
        placed = {
            n: t.model_copy(update={"model": results.get(f"teachers.{n}", t.model)})
            for n, t in self.teachers.items()
        }
        return self.model_copy(update={"teachers": placed})

    def install(self, model: nn.Module) -> Installed:
        """Check teachers and layers, put taps on the student. Raises BadInput for what does not
        fit."""
        modules = {name: built(name, t.model, model) for name, t in self._all().items()}
        on_features = [loss for loss in self.losses if not loss.on_answers]
        token = any(loss.kind == "token" for loss in self.losses)
        structure = view(model, self.input_shape, probe=False) if on_features or token else None
        if token and (structure is None or len(structure.heads) != 2):
            raise BadInput(
                f"{type(model).__name__} has no distillation token with a classifier of its own; "
                "timm's deit_*_distilled_* have"
            )
        teacher_views = {
            n: self._teacher_view(m)
            for n, m in modules.items()
            if any(loss.teacher in (n, None) for loss in on_features)
        }
        compared: list[tuple[str, Comparison | None]] = []
        for loss in self.losses:
            name = loss.teacher or next(iter(modules))
            pair = None
            if not loss.on_answers:
                assert structure is not None
                pair = compare(loss, model, structure, modules[name], teacher_views[name])
            compared.append((name, pair))
        live = InstalledDistill(self, modules, compared, model)
        if token and structure is not None:
            live.hear(model, structure.heads)
        return live

    def _teacher_view(self, module: nn.Module) -> Any:
        try:
            return view(module, probe=False)
        except BadInput:
            if self.input_shape is None:
                raise
            return view(module, self.input_shape, probe=False)


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
        are over."""
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
