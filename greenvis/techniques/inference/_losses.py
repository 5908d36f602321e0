"""What a distillation compares: one request a loss, the pairs of layers it reads, the modules it trains beside the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.techniques.inference import _features as of
from greenvis.techniques.inference import _kd
from greenvis.techniques.inference._layers import Layers, Place, attentions, features, thinned
from greenvis.views import View

Kind = Literal["kd", "dkd", "token", "hint", "attention_transfer", "review", "rkd", "cosine", "minilm"]
Relation = Literal["qk", "qq", "kk", "vv"]
ANSWERS = ("kd", "dkd", "token")  # compare answers; the others compare features
DEFAULT_LAYERS: Mapping[str, Layers] = {"attention_transfer": "block", "review": "block", "rkd": "head"}
_OWN: Mapping[str, tuple[str, ...]] = {
    "kd": ("temperature", "hard", "smoothing"),
    "dkd": ("temperature", "alpha", "beta"),
    "token": ("temperature", "hard"),
    "hint": ("residual",),
    "attention_transfer": ("p",),
    "review": ("width",),
    "rkd": ("distance", "angle"),
    "cosine": (),
    "minilm": ("relations", "heads"),
}


class Loss(BaseModel):
    """One comparison of student and teacher. A setting of another kind is refused.

    On answers: "kd" (Hinton et al., 2015), "dkd" (decoupled: Zhao et al., 2022), "token" (a distillation token with a head of
    its own: DeiT, Touvron et al., 2021). On features: "hint" (FitNets: Romero et al., 2015), "attention_transfer" (Zagoruyko &
    Komodakis, 2017), "review" (levels fused from the last to the first: in the manner of ReviewKD, Chen et al., 2021), "cosine"
    (hidden states, as in DistilBERT: Sanh et al., 2019), "rkd" (distances and angles in a batch: Park et al., 2019), "minilm"
    (relations of queries, keys and values: Wang et al., 2020, 2021). Sums over pairs of layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    shared: ClassVar[tuple[str, ...]] = ("kind", "weight", "teacher", "warmup_epochs")

    kind: Kind
    weight: Annotated[float, Field(ge=0, description="factor of this term")] = 1.0
    teacher: Annotated[str | None, Field(description="which of several teachers; all of them where absent")] = None
    warmup_epochs: Annotated[int, Field(ge=0, description="the factor grows linearly in these epochs; DKD's authors: 20")] = 0
    layers: Annotated[
        Layers | None,
        Field(description='of the student: "block" (all), "last", "head" (what goes into the classifier), numbers, paths'),
    ] = None
    teacher_layers: Annotated[Layers | None, Field(description="of the teacher; as the student's where absent")] = None
    temperature: Annotated[float | None, Field(gt=0, description="softens answers; the request's where absent")] = None
    hard: Annotated[bool, Field(description="learn the class the teacher chose, not its probabilities")] = False
    smoothing: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="where the teacher is wrong, the label smoothed by this replaces its answer (Wen et al., 2021)",
        ),
    ] = None
    alpha: Annotated[float, Field(ge=0, description="of the target class in dkd")] = 1.0
    beta: Annotated[float, Field(ge=0, description="of the other classes in dkd")] = 8.0
    p: Annotated[float, Field(gt=0, description="power of the features in an attention map")] = 2.0
    residual: Annotated[bool, Field(description="learn only what cannot be read off the student's features already")] = False
    width: Annotated[int | None, Field(ge=1, description="channels where review's levels meet")] = None
    distance: Annotated[float, Field(ge=0, description="factor of distances in rkd")] = 25.0
    angle: Annotated[float, Field(ge=0, description="factor of angles in rkd")] = 50.0
    relations: Annotated[
        tuple[Literal["qk", "qq", "kk", "vv"], ...], Field(min_length=1, description="pairs minilm relates")
    ] = (
        "qk",
        "vv",
    )
    heads: Annotated[int | None, Field(ge=1, description="of the relations; as many as both have where absent")] = None

    @model_validator(mode="after")
    def _only_its_own(self) -> Loss:
        allowed = {*self.shared, *_OWN[self.kind], *(() if self.kind in ANSWERS else ("layers", "teacher_layers"))}
        for name, field in type(self).model_fields.items():
            if name not in allowed and getattr(self, name) != field.default:
                raise ValueError(f"'{name}' is no setting of '{self.kind}', which has {', '.join(sorted(allowed - {'kind'}))}")
        if self.hard and self.smoothing is not None:
            raise ValueError("'hard' takes no soft targets that 'smoothing' could correct: set one of them")
        return self

    @property
    def on_answers(self) -> bool:
        """Whether it compares answers, not features."""
        return self.kind in ANSWERS

    def factor(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 0."""
        return self.weight * min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else self.weight

    @property
    def reads_labels(self) -> bool:
        """Whether it looks at the right class, and not only at what the teacher says."""
        return self.kind == "dkd" or self.smoothing is not None

    def answer(self, student: Tensor, log_answers: Tensor, target: Tensor | None, temperature: float) -> Tensor:
        """Return the loss on answers (rows, classes): a row per image or pixel, and its class number in `target`.

        log_answers: logarithms of the teacher's answers softened by the temperature.
        """
        logits = log_answers * temperature
        if self.hard:
            return _kd.hard_loss(student, logits)
        if self.kind == "dkd":
            return _kd.dkd_loss(student, logits, _labels(target, self.kind), self.alpha, self.beta, temperature)
        if self.smoothing is not None:
            labels = _labels(target, f"{self.kind} with smoothing")
            log_answers = _kd.corrected_targets(logits, labels, temperature, self.smoothing)
        return _kd.soft_target_loss(student, log_answers, temperature)


def _labels(target: Tensor | None, what: str) -> Tensor:
    if target is None:
        raise BadInput(f"'{what}' compares answers for the right class, so it needs labels; give them, or use plain kd")
    return target


@dataclass(frozen=True)
class Comparison:
    """A loss on features with the places it reads, by name: "0", "1", … of each pair, or "0q", "0k", "0v" of attentions."""

    loss: Loss
    student: Mapping[str, Place]
    teacher: Mapping[str, Place]
    heads: int = 1

    def modules(self) -> nn.Module | None:
        """Return what is trained beside the student: projections from its channels to the teacher's."""
        names, kind = list(self.student), self.loss.kind
        widths = [(self.student[n].width, self.teacher[n].width) for n in names]
        if kind == "review":
            return Review(widths, self.loss.width or max(8, max(s for s, _ in widths) // 2))
        if kind == "hint":
            each = 2 if self.loss.residual else 1
            return nn.ModuleList(nn.ModuleList(nn.Conv2d(s, t, 1) for _ in range(each)) for s, t in widths)
        if kind == "cosine" and any(s != t for s, t in widths):
            return nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in widths)
        return None

    def value(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], aspect: float, modules: Any) -> Tensor:
        """Return the loss of features read in one forward, by the keys of their places."""
        s = {n: p.map(student[p.key], aspect) for n, p in self.student.items()}
        t = {n: p.map(teacher[p.key], aspect) for n, p in self.teacher.items()}
        if self.loss.kind == "minilm":
            return self._relations(s, t)
        maps, targets = list(s.values()), list(t.values())
        pairs = [of.on_one_grid(a, b) for a, b in zip(maps, targets, strict=True)]
        match self.loss.kind:
            case "attention_transfer":
                return of.attention_transfer_loss(maps, targets, self.loss.p)
            case "review":
                fused = modules(maps, [m.shape[2:] for m in targets])
                return _sum([of.hierarchical_loss(a, b) for a, b in zip(fused, targets, strict=True)])
            case "rkd":
                return _sum([self._rkd(a.mean((2, 3)), b.mean((2, 3))) for a, b in zip(maps, targets, strict=True)])
            case "cosine":
                through = modules or [nn.Identity()] * len(pairs)
                return _sum([of.cosine_loss(m(a), b) for m, (a, b) in zip(through, pairs, strict=True)])
            case _:
                return _sum([_hint(m, a, b) for m, (a, b) in zip(modules, pairs, strict=True)])

    def _rkd(self, student: Tensor, teacher: Tensor) -> Tensor:
        far = self.loss.distance * of.rkd_distance_loss(student, teacher)
        return far + self.loss.angle * of.rkd_angle_loss(student, teacher)

    def _relations(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for at in dict.fromkeys(name[:-1] for name in student):
            for a, b in self.loss.relations:
                both = [of.on_one_grid(student[at + part], teacher[at + part]) for part in (a, b)]
                s, t = ((x.flatten(2).mT, y.flatten(2).mT) for x, y in zip(*both, strict=True))
                terms.append(of.relation_loss(s, t, self.heads))
        return _sum(terms)


def compare(loss: Loss, student: nn.Module, its: View, teacher: nn.Module, theirs: View) -> Comparison:
    """Choose the layers of both. Of unequal numbers the longer row is thinned evenly, its last stays. Raises BadInput."""
    wanted = loss.layers if loss.layers is not None else DEFAULT_LAYERS.get(loss.kind, "last")
    other = loss.teacher_layers if loss.teacher_layers is not None else wanted
    if loss.kind == "minilm":
        s, t = attentions(student, its, wanted), attentions(teacher, theirs, other)
        count = min(len(s), len(t))
        s, t = thinned(s, count), thinned(t, count)
        used = "".join(loss.relations)
        mine, yours = (
            {f"{i}{part}": p for i, (_, parts) in enumerate(row) for part, p in parts.items() if part in used} for row in (s, t)
        )
        everyone = [a.heads for a, _ in (*s, *t)]
        heads = loss.heads or math.gcd(*everyone)
        if wrong := [p for p in (*mine.values(), *yours.values()) if p.width % heads]:
            raise BadInput(f"'{wrong[0].key}' is {wrong[0].width} wide, which {heads} heads do not divide: give other `heads`")
        return Comparison(loss, mine, yours, heads)
    s, t = features(student, its, wanted), features(teacher, theirs, other)
    count = min(len(s), len(t))
    mine, yours = ({str(i): p for i, p in enumerate(thinned(row, count))} for row in (s, t))
    return Comparison(loss, mine, yours)


class Review(nn.Module):
    """Fuse a student's levels from the last to the first: each takes in what the deeper ones hold, where it is useful.

    widths: (student's, teacher's) channels of each level, first to last. width: channels in which levels meet.
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
    """What is trained beside the student: a module for each loss that wants one, by its number, and the teachers' weights."""

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
