"""Choose the thresholds of early exits on held-out samples: for a budget, or for a bound on the
accuracy lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from greenvis.errors import BadInput
from greenvis.techniques.inference.exits import _confidence

CLOSE = 1.05  # a budget is kept where the deciding half spends no more than this of it
LEAST = 40  # held-out samples below which no bound says anything


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they do to held-out samples that had no part in choosing them.

    exits: share of the samples that leaves at each exit, the last being the model's end. cost: mean
    MACs ÷ the whole model's.
    accuracy and whole_accuracy: of the early answers and of the model's. drop: accuracy lost;
    drop_upper: its upper bound, which holds with `confidence`. met: whether what was asked for is
    kept (a drop: by its bound).
    """

    criterion: str
    thresholds: tuple[float, ...]
    exits: tuple[float, ...]
    cost: float
    accuracy: float
    whole_accuracy: float
    drop: float
    drop_upper: float
    confidence: float
    samples: int
    asked: dict[str, float]
    met: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them: a threshold that nobody reaches is None."""
        return asdict(self) | {"thresholds": [None if abs(t) > 1e6 else t for t in self.thresholds]}


def choose(
    logits: Tensor,
    targets: Tensor,
    costs: Sequence[float],
    criterion: str,
    *,
    target_drop: float | None = None,
    budget: float | None = None,
    confidence: float = 0.95,
) -> Calibration:
    """Return thresholds for early exits. One half of the samples proposes, the other decides and
    bounds the drop.

    logits: (exits, samples, classes) of held-out samples, the model's own last; targets:
    (samples,). costs: of leaving at each exit. target_drop: the accuracy that may be lost, 0 to 1.
    One threshold for all exits goes down from one that nobody reaches for as long as the bound
    stays below (fixed-sequence testing: Angelopoulos et al., 2021, "Learn then Test"), so the bound
    holds for the threshold chosen. budget: mean cost ÷ the whole model's, with MSDNet's geometric
    shares. Raises BadInput.
    """
    if (target_drop is None) == (budget is None):
        raise BadInput(
            "calibrate takes either target_drop (accuracy that may be lost) or budget (share of "
            "the MACs)"
        )
    if len(targets) < LEAST:
        raise BadInput(
            f"calibrate was given {len(targets)} held-out samples; give {LEAST} at least, some "
            "thousands for a tight bound"
        )
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    propose, decide = order[: len(order) // 2], order[len(order) // 2 :]
    sure = _confidence.confidences(logits, criterion)
    right = logits.argmax(-1) == targets
    held_out = _HeldOut(
        sure[:, decide],
        right[:, decide],
        torch.as_tensor(costs, dtype=torch.float64),
        criterion,
        confidence,
    )
    if budget is not None:
        tried = _for_budget(sure[:, propose], held_out.costs, budget, criterion)
        judged = [held_out.judge(thresholds, {"budget": budget}, False) for thresholds in tried]
        candidate = next((j for j in judged if j.cost <= budget), judged[-1])
        return replace(candidate, met=candidate.cost <= budget * CLOSE)
    assert target_drop is not None
    never = (_confidence.NEVER,) * (len(logits) - 1)
    best = held_out.judge(never, {"target_drop": target_drop}, True)
    for threshold in _confidence.common_thresholds(sure[:, propose], criterion):
        candidate = held_out.judge(
            (threshold,) * (len(logits) - 1), {"target_drop": target_drop}, True
        )
        if candidate.drop_upper > target_drop:
            break
        best = candidate
    return best


@dataclass(frozen=True)
class _HeldOut:
    """The deciding half. sure, right: (exits, samples)."""

    sure: Tensor
    right: Tensor
    costs: Tensor
    criterion: str
    confidence: float

    def judge(
        self, thresholds: tuple[float, ...], asked: dict[str, float], met: bool
    ) -> Calibration:
        """Say what thresholds do to these samples."""
        at = _confidence.leaves_at(self.sure, (*thresholds, _confidence.ALWAYS))
        early, full = self.right.gather(0, at[None])[0], self.right[-1]
        lost, gained, samples = int((full & ~early).sum()), int((early & ~full).sum()), len(at)
        # then nothing can be lost, here or elsewhere, with thresholds of never
        nobody = bool((at == len(self.costs) - 1).all())
        never = nobody and all(t == _confidence.NEVER for t in thresholds)
        return Calibration(
            self.criterion, thresholds, tuple((torch.bincount(at,
            minlength=len(self.costs)) / samples).tolist()),
            float(self.costs[at].mean() / self.costs[-1]), float(early.float().mean()),
            float(full.float().mean()),
            (lost - gained) / samples, 0.0 if never else _confidence.drop_bound(lost, gained,
            samples, self.confidence),
            self.confidence, samples, asked, met,
        )  # fmt: skip


def _for_budget(
    sure: Tensor, costs: Tensor, budget: float, criterion: str
) -> list[tuple[float, ...]]:
    """Return thresholds to try, the first that keeps the budget being it."""
    if not costs[0] / costs[-1] <= budget <= 1:
        raise BadInput(
            f"budget is {budget}; between {float(costs[0] / costs[-1]):.3f} (all leave at the "
            "first exit) and 1 can be kept"
        )
    if criterion == "patience":
        return [(t,) * (len(costs) - 1) for t in _confidence.common_thresholds(sure, criterion)]
    shares = _confidence.shares_for_budget(costs, budget * float(costs[-1]))
    return [tuple(_confidence.budget_thresholds(sure, shares).tolist()[:-1])]
