"""What a distillation compares: one request a loss, the pairs of layers it reads, the modules it
trains beside the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.techniques._shared import features as of
from greenvis.techniques.inference.distill import _kd
from greenvis.techniques.inference.distill._layers import (
    Layers,
    TapPoint,
    attentions,
    features,
    thinned,
)

Kind = Literal[
    "kd", "dkd", "token", "hint", "attention_transfer", "review", "rkd", "cosine", "minilm"
]
ANSWERS = ("kd", "dkd", "token")  # compare answers; the others compare features
DEFAULT_LAYERS: Mapping[str, Layers] = {
    "attention_transfer": "block",
    "review": "block",
    "rkd": "head",
}
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


@dataclass(frozen=True)
class Comparison:
    """A loss on features with the places it reads, by name: "0", "1", … of each pair, or "0q",
    "0k", "0v" of attentions."""

    loss: Loss
    student: Mapping[str, TapPoint]
    teacher: Mapping[str, TapPoint]
    heads: int = 1

    def modules(self) -> nn.Module | None:
        """Return what is trained beside the student: projections from its channels to the
        teacher's."""
        names, kind = list(self.student), self.loss.kind
        widths = [(self.student[n].width, self.teacher[n].width) for n in names]
        if kind == "review":
            return Review(widths, self.loss.width or max(8, max(s for s, _ in widths) // 2))
        if kind == "hint":
            each = 2 if self.loss.residual else 1
            return nn.ModuleList(
                nn.ModuleList(nn.Conv2d(s, t, 1) for _ in range(each)) for s, t in widths
            )
        if kind == "cosine" and any(s != t for s, t in widths):
            return nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in widths)
        return None

    def value(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        aspect: float,
        modules: Any,
    ) -> Tensor:
        """Return the loss of features read in one forward, by the keys of their places."""
        s = {n: p.map(student[p.key], aspect) for n, p in self.student.items()}
        t = {n: p.map(teacher[p.key], aspect) for n, p in self.teacher.items()}
        if self.loss.kind == "rkd":
            return _sum([self._rkd(s[n].mean((2, 3)), t[n].mean((2, 3))) for n in s])
        if self.loss.kind == "review":
            return self._review(s, t, self._prefixes(student, teacher), modules)
        pairs = {n: of.on_one_grid(s[n], t[n]) for n in s}
        for n, (a, b) in self._prefixes(student, teacher).items():
            pairs[n] = of.beside(a, pairs[n][0]), of.beside(b, pairs[n][1])
        match self.loss.kind:
            case "minilm":
                return self._relations(pairs)
            case "attention_transfer":
                maps, targets = zip(*pairs.values(), strict=True)
                return of.attention_transfer_loss(maps, targets, self.loss.p)
            case "cosine":
                through = modules or [nn.Identity()] * len(pairs)
                return _sum(
                    [
                        of.cosine_loss(m(a), b)
                        for m, (a, b) in zip(through, pairs.values(), strict=True)
                    ]
                )
            case _:
                return _sum(
                    [_hint(m, a, b) for m, (a, b) in zip(modules, pairs.values(), strict=True)]
                )

    def shared_prefix(self, name: str) -> int:
        """Return how many class and register tokens of a pair are compared."""
        if self.loss.tokens == "all":
            return min(self.student[name].prefix, self.teacher[name].prefix)
        return 0

    def _prefixes(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        shared = {n: count for n in self.student if (count := self.shared_prefix(n))}
        sides = ((self.student, student), (self.teacher, teacher))
        return {
            n: tuple(p[n].tokens(read[p[n].key], count) for p, read in sides)
            for n, count in shared.items()
        }  # type: ignore[misc]

    def _review(
        self,
        s: Mapping[str, Tensor],
        t: Mapping[str, Tensor],
        prefixes: Mapping[str, tuple[Tensor, Tensor]],
        modules: Any,
    ) -> Tensor:
        """Return the loss of fused maps, and of tokens that are no patches, each fused as a map of
        one place."""

        def fused(maps: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
            out = modules(maps, [m.shape[2:] for m in targets])
            return [of.hierarchical_loss(a, b) for a, b in zip(out, targets, strict=True)]

        terms = fused([*s.values()], [*t.values()])
        if len(prefixes) == len(s):
            count = min(a.shape[3] for a, _ in prefixes.values())
            single = [
                [m[..., :count].permute(0, 3, 1, 2).flatten(0, 1)[..., None] for m in pair]
                for pair in prefixes.values()
            ]
            sizes = [of.on_one_grid(s[n], t[n])[0][0, 0].numel() for n in s]
            apart = fused([a for a, _ in single], [b for _, b in single])
            terms = [
                (a * n + b * count) / (n + count)
                for a, b, n in zip(terms, apart, sizes, strict=True)
            ]
        return _sum(terms)

    def _rkd(self, student: Tensor, teacher: Tensor) -> Tensor:
        far = self.loss.distance * of.rkd_distance_loss(student, teacher)
        return far + self.loss.angle * of.rkd_angle_loss(student, teacher)

    def _relations(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        terms = []
        for at in dict.fromkeys(name[:-1] for name in pairs):
            for a, b in self.loss.relations:
                s, t = (
                    (x.flatten(2).mT, y.flatten(2).mT)
                    for x, y in zip(pairs[at + a], pairs[at + b], strict=True)
                )
                terms.append(of.relation_loss(s, t, self.heads))
        return _sum(terms)


def compare(
    loss: Loss, student: nn.Module, student_view: View, teacher: nn.Module, teacher_view: View
) -> Comparison:
    """Choose the layers of both. Of unequal numbers the longer row is thinned evenly, its last
    stays. Raises BadInput."""
    layers = loss.layers if loss.layers is not None else DEFAULT_LAYERS.get(loss.kind, "last")
    other = loss.teacher_layers if loss.teacher_layers is not None else layers
    if loss.kind == "minilm":
        s, t = attentions(student, student_view, layers), attentions(teacher, teacher_view, other)
        count = min(len(s), len(t))
        s, t = thinned(s, count), thinned(t, count)
        used = "".join(loss.relations)
        mine, yours = (
            {
                f"{i}{part}": p
                for i, (_, parts) in enumerate(row)
                for part, p in parts.items()
                if part in used
            }
            for row in (s, t)
        )
        everyone = [a.heads for a, _ in (*s, *t)]
        heads = loss.heads or math.gcd(*everyone)
        if wrong := [p for p in (*mine.values(), *yours.values()) if p.width % heads]:
            raise BadInput(
                f"'{wrong[0].key}' is {wrong[0].width} wide, which {heads} heads do not divide: "
                "give other `heads`"
            )
        return Comparison(loss, mine, yours, heads)
    s, t = features(student, student_view, layers), features(teacher, teacher_view, other)
    count = min(len(s), len(t))
    mine, yours = ({str(i): p for i, p in enumerate(thinned(row, count))} for row in (s, t))
    return Comparison(loss, mine, yours)


class Review(nn.Module):
    """Fuse a student's levels from the last to the first: each takes in what the deeper ones hold,
    where it is useful.

    widths: (student's, teacher's) channels of each level, first to last. width: channels in which
    levels meet.
    """

    def __init__(self, widths: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Conv2d(s, width, 1) for s, _ in widths)
        self.leave = nn.ModuleList(nn.Conv2d(width, t, 3, padding=1) for _, t in widths)
        self.gates = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in widths[1:])

    def forward(self, maps: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return a map for each level, with the teacher's channels and in its size."""
        out: list[Tensor] = []
        deeper: Tensor | None = None
        for i in reversed(range(len(maps))):
            x = self.enter[i](maps[i])
            if deeper is not None:
                above = F.interpolate(deeper, x.shape[2:])
                own, taken = torch.sigmoid(self.gates[i](torch.cat([x, above], 1))).chunk(2, 1)
                x = own * x + taken * above
            deeper = x
            out.append(self.leave[i](F.interpolate(x, tuple(sizes[i]))))
        return out[::-1]


class Projections(nn.Module):
    """What is trained beside the student: a module for each loss that wants one, by its number, and
    the teachers' weights."""

    def __init__(self, parts: Mapping[int, nn.Module], teachers: int) -> None:
        super().__init__()
        for i, part in parts.items():
            self.add_module(str(i), part)
        if teachers:
            self.teachers = nn.Parameter(torch.zeros(teachers))


def _hint(modules: Any, student: Tensor, teacher: Tensor) -> Tensor:
    if len(modules) == 1:
        return F.mse_loss(modules[0](student), teacher)
    known, lacking = modules
    has = known(student.detach())  # what a linear map reads off the student as it is
    return F.mse_loss(has, teacher) + F.mse_loss(lacking(student), teacher - has.detach())


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
