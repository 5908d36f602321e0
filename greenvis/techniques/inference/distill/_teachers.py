"""Several teachers: how much each counts for a sample, what they say together, and how much they
contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.errors import GreenvisError
from greenvis.tasks.answers import class_numbers, class_rows
from greenvis.techniques.inference.distill._frozen_teacher import ANSWER


def compared_rows(
    student: Tensor, teacher_outputs: Mapping[str, dict[str, Tensor]], y: Any
) -> tuple[Tensor, Tensor | None]:
    """Return answers as rows, one per image or pixel.

    Args:
        student: its answers.
        teacher_outputs: each teacher's outputs, whose answers become rows, too.
        y: labels, or None.

    Returns:
        The student's rows, and their class numbers where labels are known.

    Raises:
        GreenvisError: where a teacher's answers have another shape than the student's.
    """
    for outputs in teacher_outputs.values():
        if outputs[ANSWER].shape != student.shape:
            raise GreenvisError(
                f"the teacher's logits are {tuple(outputs[ANSWER].shape)}, the student's "
                f"{tuple(student.shape)}: both must answer for the same classes; set num_classes "
                "of the teacher, or distil features only"
            )
        outputs[ANSWER] = class_rows(outputs[ANSWER])
    return class_rows(student), class_numbers(y, student, "distillation") if y is not None else None


def mixed(log_answers: Tensor, weights: Tensor) -> Tensor:
    """Return the logarithms of the weighted mean of answers, (batch, classes).

    log_answers: logarithms of probabilities, (teachers, batch, classes). weights: (teachers,
    batch), of sum 1 over teachers.
    """
    return (log_answers + weights.clamp(min=1e-30).log()[..., None]).logsumexp(0)


def by_agreement(log_answers: Tensor, prior: Tensor) -> Tensor:
    """Return weights (teachers, batch) ∝ prior · exp(−KL(all together ‖ teacher)): who stands alone
    counts less.

    prior: (teachers,), of sum 1. Labels are not looked at, so unlabelled images will do.
    """
    together = mixed(log_answers, prior[:, None].expand(log_answers.shape[:2]))
    apart = (together.exp() * (together - log_answers)).sum(-1)
    return (prior.log()[:, None] - apart).softmax(0)


def by_confidence(logits: Tensor, target: Tensor, prior: Tensor) -> Tensor:
    """Return weights (teachers, batch): who is surer of a sample's label counts more for it
    (CA-MKD: Zhang et al., 2022).

    (1 − exp(CEᵢ) / Σⱼ exp(CEⱼ)) / (teachers − 1) with cross-entropies CE, times the prior, scaled
    to sum 1.
    logits: (teachers, batch, classes). target: int64 (batch,).
    """
    if len(logits) == 1:
        return logits.new_ones(logits.shape[:2])
    wrong = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits])
    weights = (1 - wrong.softmax(0)) / (len(logits) - 1) * prior[:, None]
    return weights / weights.sum(0).clamp(min=1e-12)


def conflict(student_logits: Tensor, logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """Return how much teachers contradict each other, each a scalar averaged over samples and pairs
    of teachers.

    "disagreement": how often two choose other classes. "kl": the symmetric divergence of their
    softened answers, in nats.
    "cosine": between the gradients that each alone would give the student's logits; below 0 they
    pull apart.
    logits: (teachers, batch, classes), of at least two teachers.
    """
    log_answers = F.log_softmax(logits / temperature, dim=-1)
    pulls = F.softmax(student_logits / temperature, dim=-1) - log_answers.exp()
    measures: dict[str, list[Tensor]] = {"disagreement": [], "kl": [], "cosine": []}
    for a, b in combinations(range(len(logits)), 2):
        p, q = log_answers[a], log_answers[b]
        measures["disagreement"].append(
            (logits[a].argmax(-1) != logits[b].argmax(-1)).float().mean()
        )
        measures["kl"].append(((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2)
        measures["cosine"].append(F.cosine_similarity(pulls[a], pulls[b], dim=-1).mean())
    return {name: torch.stack(values).mean() for name, values in measures.items()}


class Conflicts:
    """The `conflict` of each epoch, averaged over its steps."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, student_logits: Tensor, logits: Tensor, temperature: float) -> None:
        """Note a step; one teacher has no conflict."""
        if len(logits) > 1:
            for name, value in conflict(student_logits.detach(), logits, temperature).items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._steps += 1

    def end(self) -> None:
        """Close the epoch."""
        for name, total in self._sums.items():
            self.history.setdefault(name, []).append(round(total.item() / self._steps, 6))
        self._sums, self._steps = {}, 0


def weights_of(
    how: str,
    logits: Tensor,
    target: Tensor | None,
    prior: Sequence[float],
    temperature: float,
    learned: Tensor | None = None,
) -> Tensor:
    """Return each teacher's weight for each sample, (teachers, batch), of sum 1 over teachers.

    how: "fixed", "agreement", "confidence" or "learned" (softmax of `learned`, one number a
    teacher).
    """
    prior_weights = torch.tensor(list(prior), dtype=logits.dtype, device=logits.device)
    prior_weights = prior_weights / prior_weights.sum()
    rules: Mapping[str, Callable[[], Tensor]] = {
        "fixed": lambda: prior_weights[:, None].expand(logits.shape[:2]),
        "agreement": lambda: by_agreement(
            F.log_softmax(logits / temperature, dim=-1), prior_weights
        ),
        "confidence": lambda: by_confidence(logits, _needed(target), prior_weights),
        "learned": lambda: _needed(learned).to(logits).softmax(0)[:, None].expand(logits.shape[:2]),
    }
    return rules[how]()


def _needed(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
