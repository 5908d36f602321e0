"""Knowledge distillation: a small student learns from large frozen teachers, their answers,
features and relations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, nearest
from greenvis.models.structure import view
from greenvis.tasks.answers import CLASSES, IMAGES, PIXELS_TOO
from greenvis.techniques.inference.distill._comparison import Comparison, compare
from greenvis.techniques.inference.distill._frozen_teacher import (
    ITSELF,
    CacheOptions,
    Teacher,
    built,
)
from greenvis.techniques.inference.distill._kd import dkd_loss, kd_loss, kd_task_loss
from greenvis.techniques.inference.distill._live import InstalledDistill
from greenvis.techniques.inference.distill._losses import Loss

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
