"""The mathematics of early exits: how sure an exit is, when samples leave, and thresholds with a
guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

NEVER = math.inf  # a threshold that no confidence reaches
ALWAYS = -1e8  # the last exit's: whoever gets there is answered


def certainty(logits: Tensor, criterion: str) -> Tensor:
    """Return how sure an answer is, float32 (…): the largest probability, or 1 − entropy /
    log(classes). Both are 0 to 1.

    logits: (…, classes). criterion: "max_prob" (MSDNet: Huang et al., 2018) or "entropy"
    (BranchyNet: Teerapittayanon et al., 2016, whose threshold on the entropy is turned round, so
    that for both criteria more is surer).
    """
    logs = F.log_softmax(logits.float(), dim=-1)
    if criterion == "max_prob":
        return logs.amax(-1).exp()
    return 1 + (logs.exp() * logs).sum(-1) / math.log(max(logits.shape[-1], 2))


def agreements(
    predicted: Tensor, before: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Return for how many exits in a row the answer has stayed, int64 (batch,) (patience; PABEE:
    Zhou et al., 2020).

    predicted: this exit's answers (batch,). before: the exit's before it, None at the first; count:
    what this gave there.
    """
    if before is None or count is None:
        return torch.zeros_like(predicted)
    return torch.where(predicted == before, count + 1, 0)


def confidences(logits: Tensor, criterion: str) -> Tensor:
    """Return how sure each exit is of each sample, float32 (exits, samples). logits: (exits,
    samples, classes).

    criterion: as in `certainty`, or "patience" (`agreements`).
    """
    if criterion != "patience":
        return certainty(logits, criterion)
    predicted, rows = logits.argmax(-1), [agreements(logits[0].argmax(-1))]
    for k in range(1, len(logits)):
        rows.append(agreements(predicted[k], predicted[k - 1], rows[-1]))
    return torch.stack(rows).float()


def leaves_at(confidence: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Return the exit each sample leaves at, int64 (samples,): the first where confidence ≥
    threshold, else the last.

    confidence: (exits, samples). thresholds: one per exit; the last exit's is not looked at.
    """
    limits = torch.as_tensor(thresholds, dtype=torch.float64)[:, None]
    sure = confidence.double() >= limits
    sure[-1] = True
    return sure.long().argmax(0)


def geometric_shares(log_p: float, exits: int) -> Tensor:
    """Return what share of the samples is to leave at each exit: p, p², … normalised (MSDNet).

    Args:
        log_p: logarithm of p.
        exits: how many, the model's end among them.

    Returns:
        float64 (exits,).
    """
    return torch.softmax(log_p * torch.arange(1, exits + 1, dtype=torch.float64), 0)


def shares_for_budget(costs: Sequence[float] | Tensor, budget: float) -> Tensor:
    """Return the geometric shares (exits,) whose mean cost is `budget`, or the nearest there is.

    costs: what a sample costs that leaves at each exit, growing. budget: in the same unit.
    """
    spent = torch.as_tensor(costs, dtype=torch.float64)
    low, high = -50.0, 50.0  # log p; the mean cost grows with it
    for _ in range(100):
        middle = (low + high) / 2
        over = float((geometric_shares(middle, len(spent)) * spent).sum()) > budget
        low, high = (low, middle) if over else (middle, high)
    return geometric_shares(low, len(spent))


def budget_thresholds(confidence: Tensor, shares: Tensor) -> Tensor:
    """Return thresholds (exits,) by which these shares of the samples leave (MSDNet: Huang et al.,
    2018, section 4.2).

    confidence: (exits, samples), of held-out samples, never of the test set. At exit k, ⌊samples ·
    share⌋ of those still in leave, the surest first; what is as sure leaves with them. An exit that
    nobody is to leave at gets 1e8, the last −1e8.
    """
    exits, samples = confidence.shape
    thresholds = torch.full((exits,), -ALWAYS, dtype=confidence.dtype)
    still = torch.ones(samples, dtype=torch.bool)
    for k in range(exits - 1):
        quota = math.floor(samples * float(shares[k]))
        left = confidence[k][still]
        if 0 < quota <= len(left):
            thresholds[k] = left.topk(quota).values[-1]
        still &= confidence[k] < thresholds[k]
    thresholds[-1] = ALWAYS
    return thresholds


def drop_bound(lost: int, gained: int, samples: int, confidence: float) -> float:
    """Return an upper bound on the accuracy lost by leaving early, −1 to 1, that holds with this
    confidence.

    lost, gained: samples that only the whole model, or only its exits, answered rightly, of so many
    independent ones. The two shares are bounded exactly (Clopper and Pearson, 1934), each with half
    of the risk.
    """
    risk = (1 - confidence) / 2
    most = float(betaincinv(lost + 1, samples - lost, 1 - risk)) if lost < samples else 1.0
    least = float(betaincinv(gained, samples - gained + 1, risk)) if gained else 0.0
    return most - least


def common_thresholds(confidence: Tensor, criterion: str) -> list[float]:
    """Return one threshold for all exits, from safe to cheap (Shallow-Deep Networks: Kaya et al.,
    2019, use one).

    confidence: (exits, samples); quantiles of it, so that each step lets about as many more samples
    leave.
    """
    if criterion == "patience":
        return [float(t) for t in range(len(confidence) - 2, 0, -1)]
    marks = torch.quantile(
        confidence[:-1].double().amax(0), torch.linspace(1, 0, 100, dtype=torch.float64)
    )
    return sorted(set(marks.tolist()), reverse=True)


def self_distillation(early: Tensor, last: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(last ‖ early) of softened answers, a scalar: the last exit teaches, and does
    not learn from it.

    Both logits: (batch, classes) (Zhang et al., 2019, "Be Your Own Teacher").
    """
    student = F.log_softmax(early.float() / temperature, dim=-1)
    teacher = F.log_softmax(last.detach().float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
