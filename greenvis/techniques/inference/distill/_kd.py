"""Losses of distillation on answers: what a student's logits should learn from a teacher's. Pure
functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ student) of softened answers (Hinton et al., 2015, section 2), a
    scalar.

    Both logits: (batch, classes). Summed over classes, averaged over the batch; T² keeps its
    gradient comparable to the task loss's whatever the temperature.
    """
    return soft_target_loss(
        student_logits, F.log_softmax(teacher_logits / temperature, dim=-1), temperature
    )


def soft_target_loss(student_logits: Tensor, log_targets: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(targets ‖ student softened by T), a scalar. log_targets: logarithms of
    probabilities, (batch, classes)."""
    student = F.log_softmax(student_logits / temperature, dim=-1)
    return F.kl_div(student, log_targets, reduction="batchmean", log_target=True) * temperature**2


def kd_task_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float,
    alpha: float | None = None,
) -> Tensor:
    """Return α · cross-entropy + (1 − α) · T² · KL, one loss for both tasks; alpha None or 0: KL
    alone, without T².

    The convention of torchdistill's recipes, for results that are to be compared with its. target:
    int64 (batch,).
    """
    soft = kd_loss(student_logits, teacher_logits, temperature)
    if not alpha:
        return soft / temperature**2
    return alpha * F.cross_entropy(student_logits, target) + (1 - alpha) * soft


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return α · TCKD + β · NCKD, a scalar: distillation decoupled (Zhao et al., 2022, equation 8).

    TCKD compares how sure both are of the label against all the rest; NCKD what they think of the
    rest among itself, which plain distillation weakens just where the teacher is sure. target:
    int64 (batch,).
    """
    rest = F.one_hot(target, student_logits.shape[-1]).logical_not()
    student, teacher = (logits / temperature for logits in (student_logits, teacher_logits))
    binary = [
        torch.stack(
            [z.gather(1, target[:, None])[:, 0], _rest(z, rest).logsumexp(-1)], -1
        ).log_softmax(-1)
        for z in (student, teacher)
    ]
    others = [_rest(z, rest).log_softmax(-1) for z in (student, teacher)]
    tckd, nckd = (
        F.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)
        for of_student, of_teacher in (binary, others)
    )
    return (alpha * tckd + beta * nckd) * temperature**2


def corrected_targets(
    teacher_logits: Tensor, target: Tensor, temperature: float, smoothing: float
) -> Tensor:
    """Return the logarithms of soft targets (batch, classes); where the teacher is wrong, the
    smoothed label stands instead.

    Knowledge adjustment by label smoothing (Wen et al., 2021): the label gets 1 − smoothing, and
    all classes share the rest.
    """
    classes = teacher_logits.shape[-1]
    log_soft = F.log_softmax(teacher_logits / temperature, dim=-1)
    smooth = F.one_hot(target, classes).to(log_soft) * (1 - smoothing) + smoothing / classes
    wrong = (teacher_logits.argmax(-1) != target)[:, None]
    return torch.where(wrong, smooth.log(), log_soft)


def hard_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross-entropy with the class the teacher chose, a scalar.

    The second term of DeiT's equation 3 (Touvron et al., 2021) without its factor 1/2, which is a
    weight's affair.
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(-1))


def _rest(logits: Tensor, rest: Tensor) -> Tensor:
    """Return the logits of all classes but the label, (batch, classes − 1)."""
    return logits[rest].view(len(logits), -1)
