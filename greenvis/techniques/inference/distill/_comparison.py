"""Losses on features: pairs of layers that are read, modules that train beside the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.techniques._shared import features as of
from greenvis.techniques.inference.distill._layers import (
    Layers,
    TapPoint,
    attentions,
    features,
    thinned,
)
from greenvis.techniques.inference.distill._losses import Loss

DEFAULT_LAYERS: Mapping[str, Layers] = {
    "attention_transfer": "block",
    "review": "block",
    "rkd": "head",
}


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
