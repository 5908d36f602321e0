"""What a distillation compares: one request a loss, the pairs of layers it reads, the modules it
trains beside the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from greenvis.errors import BadInput
from greenvis.techniques.inference.distill import _kd
from greenvis.techniques.inference.distill._layers import Layers

Kind = Literal[
    "kd", "dkd", "token", "hint", "attention_transfer", "review", "rkd", "cosine", "minilm"
]
ANSWERS = ("kd", "dkd", "token")  # compare answers; the others compare features
_OWN: Mapping[str, tuple[str, ...]] = {
    "kd": ("temperature", "hard", "smoothing"),
    "dkd": ("temperature", "alpha", "beta"),
    "token": ("temperature", "hard"),
    "hint": ("residual", "tokens"),
    "attention_transfer": ("p", "tokens"),
    "review": ("width", "tokens"),
    "rkd": ("distance", "angle"),
    "cosine": ("tokens",),
    "minilm": ("relations", "heads", "tokens"),
}


class Loss(BaseModel):
    """One comparison of student and teacher. A setting of another kind is refused.

    On answers: "kd" (Hinton et al., 2015), "dkd" (decoupled: Zhao et al., 2022), "token" (a
    distillation token with a head of its own: DeiT, Touvron et al., 2021; its equation 3 is `hard`,
    with task_weight 0.5 and weight 0.5). On features: "hint" (FitNets: Romero et al., 2015),
    "attention_transfer" (Zagoruyko & Komodakis, 2017), "review" (levels fused from the last to the
    first: in the manner of ReviewKD, Chen et al., 2021), "cosine" (hidden states, as in
    DistilBERT: Sanh et al., 2019),
    "rkd" (distances and angles in a batch: Park et al., 2019), "minilm" (relations of queries, keys
    and values: Wang et al., 2020, 2021). Sums over pairs of layers. Of a transformer's layer all
    but rkd compare all tokens, as the papers on transformers do: patches on one grid, and as many
    class and register tokens as both have, in their order. Where one has none, as a residual
    network, patches alone: a classifier of the class token then has no lesson of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    shared: ClassVar[tuple[str, ...]] = ("kind", "weight", "teacher", "warmup_epochs")

    kind: Kind
    weight: float = Field(default=1.0, ge=0, description="factor of this term")
    teacher: str | None = Field(
        default=None, description="which of several teachers; all of them where absent"
    )
    warmup_epochs: int = Field(
        default=0, ge=0, description="the factor grows linearly in these epochs; DKD's authors: 20"
    )
    layers: Layers | None = Field(
        default=None,
        description='of the student: "block" (all), "last", "head" (what goes into the '
        "classifier), numbers, paths",
    )
    teacher_layers: Layers | None = Field(
        default=None, description="of the teacher; as the student's where absent"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="softens answers; the request's where absent"
    )
    hard: bool = Field(
        default=False, description="learn the class the teacher chose, not its probabilities"
    )
    smoothing: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="where the teacher is wrong, the label smoothed by this replaces its "
        "answer (Wen et al., 2021)",
    )
    alpha: float = Field(default=1.0, ge=0, description="of the target class in dkd")
    beta: float = Field(default=8.0, ge=0, description="of the other classes in dkd")
    p: float = Field(default=2.0, gt=0, description="power of the features in an attention map")
    residual: bool = Field(
        default=False,
        description="learn only what cannot be read off the student's features already",
    )
    width: int | None = Field(default=None, ge=1, description="channels where review's levels meet")
    distance: float = Field(default=25.0, ge=0, description="factor of distances in rkd")
    angle: float = Field(default=50.0, ge=0, description="factor of angles in rkd")
    relations: tuple[Literal["qk", "qq", "kk", "vv"], ...] = Field(
        default=("qk", "vv"), min_length=1, description="pairs minilm relates"
    )
    heads: int | None = Field(
        default=None, ge=1, description="of the relations; as many as both have where absent"
    )
    tokens: Literal["all", "patches"] = Field(
        default="all",
        description="whether class and register tokens are compared beside the patches",
    )

    @model_validator(mode="after")
    def _only_its_own(self) -> Loss:
        allowed = {
            *self.shared,
            *_OWN[self.kind],
            *(() if self.kind in ANSWERS else ("layers", "teacher_layers")),
        }
        for name, field in type(self).model_fields.items():
            if name not in allowed and getattr(self, name) != field.default:
                raise ValueError(
                    f"'{name}' is no setting of '{self.kind}', which has "
                    f"{', '.join(sorted(allowed - {'kind'}))}"
                )
        if self.hard and self.smoothing is not None:
            raise ValueError(
                "'hard' takes no soft targets that 'smoothing' could correct: set one of them"
            )
        return self

    @property
    def on_answers(self) -> bool:
        """Whether it compares answers, not features."""
        return self.kind in ANSWERS

    def factor(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 0."""
        if self.warmup_epochs:
            return self.weight * min((epoch + 1) / self.warmup_epochs, 1.0)
        return self.weight

    @property
    def reads_labels(self) -> bool:
        """Whether it looks at the right class, and not only at what the teacher says."""
        return self.kind == "dkd" or self.smoothing is not None

    def answer(
        self, student: Tensor, log_answers: Tensor, target: Tensor | None, temperature: float
    ) -> Tensor:
        """Return the loss on answers (rows, classes): a row per image or pixel, and its class
        number in `target`.

        log_answers: logarithms of the teacher's answers softened by the temperature.
        """
        logits = log_answers * temperature
        if self.hard:
            return _kd.hard_loss(student, logits)
        if self.kind == "dkd":
            return _kd.dkd_loss(
                student, logits, _labels(target, self.kind), self.alpha, self.beta, temperature
            )
        if self.smoothing is not None:
            labels = _labels(target, f"{self.kind} with smoothing")
            log_answers = _kd.corrected_targets(logits, labels, temperature, self.smoothing)
        return _kd.soft_target_loss(student, log_answers, temperature)


def _labels(target: Tensor | None, what: str) -> Tensor:
    if target is None:
        raise BadInput(
            f"'{what}' compares answers for the right class, so it needs labels; give them, or use "
            "plain kd"
        )
    return target
